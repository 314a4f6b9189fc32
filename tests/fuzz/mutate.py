"""Ways to damage a file: in its bytes, in its numbers, and in what a zip file or a JSON header wraps up."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable

_NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63,
    2**64 - 1,
)


def damaged(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A file with one to four kinds of damage.

    Args:
        content: A whole file.
        others: More of them, to take pieces from.
        rng: Decides everything.
    """
    wraps = _zip if content.startswith(b"PK") else _json if content[8:9] == b"{" else None
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        # Half of the damage to a wrapped part goes past the checks of the wrapping.
        if wraps is not None and rng.random() < 0.5:
            content = wraps(content, others, rng)
        else:
            content = rng.choice(_PLAIN)(content, others, rng)
    return content


def _flip(content: bytes, _: list[bytes], rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 3)) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _set(content: bytes, _: list[bytes], rng: random.Random) -> bytes:
    data = bytearray(content)
    if data:
        data[rng.randrange(len(data))] = rng.choice((0, 0xFF, rng.randrange(256)))
    return bytes(data)


def _cut(content: bytes, _: list[bytes], rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _remove(content: bytes, _: list[bytes], rng: random.Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    return content[:start] + content[start + rng.randrange(1, 17) :]


def _insert(content: bytes, _: list[bytes], rng: random.Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    return content[:start] + rng.randbytes(rng.randrange(1, 17)) + content[start:]


def _repeat(content: bytes, _: list[bytes], rng: random.Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    piece = content[start : start + rng.randrange(1, 65)]
    return content[:start] + piece * rng.choice((2, 3, 100)) + content[start + len(piece) :]


def _splice(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    other = rng.choice(others)
    return content[: rng.randrange(len(content) + 1)] + other[rng.randrange(len(other) + 1) :]


def _number(content: bytes, _: list[bytes], rng: random.Random) -> bytes:
    size, code = rng.choice(((1, "B"), (2, "H"), (4, "I"), (8, "Q")))
    if len(content) < size:
        return content
    start = rng.randrange(min(len(content) - size + 1, rng.choice((64, 10**9))))
    value = rng.choice(_NUMBERS) % (1 << 8 * size)
    return content[:start] + struct.pack(rng.choice("<>") + code, value) + content[start + size :]


_PLAIN: tuple[Callable[[bytes, list[bytes], random.Random], bytes], ...] = (
    _flip,
    _set,
    _cut,
    _remove,
    _insert,
    _repeat,
    _splice,
    _number,
)


def _zip(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Damages one entry, and wraps all up again with the right sizes and sums."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:  # damaged before
        entries = []
    if not entries:
        return _flip(content, others, rng)
    chosen = rng.randrange(len(entries)) if rng.random() < 0.3 else _index(entries, "data.pkl")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for i, (name, data) in enumerate(entries):
            archive.writestr(name, rng.choice(_PLAIN)(data, [data], rng) if i == chosen else data)
    return file.getvalue()


def _index(entries: list[tuple[str, bytes]], suffix: str) -> int:
    return next((i for i, (name, _) in enumerate(entries) if name.endswith(suffix)), 0)


def _json(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Changes one value of a safetensors header, and its length accordingly."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        name = rng.choice(list(header))
        field = rng.choice(list(header[name]))
    except (ValueError, IndexError, TypeError):
        return _flip(content, others, rng)
    values = (None, -1, "F64", "x", [], [2**63], [-1], [1] * 100, {}, 1e300, [0, 2**64], rng.choice(_NUMBERS))
    if isinstance(header[name], dict):
        header[name][field] = rng.choice(values)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]
