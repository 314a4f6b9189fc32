"""Rebuild clip_jax/tokenizers/data/clip_merges.txt.gz from the wheel of the PyPI package `open_clip_torch`.

    python tools/rebuild_clip_merges.py [open_clip_torch-3.3.0-py3-none-any.whl]

Without a path the wheel is fetched with `pip download`. The source, `bpe_simple_vocab_16e6.txt.gz`, is OpenAI
CLIP's file; of its merges CLIP uses the first 48,894 (simple_tokenizer.py, `SimpleTokenizer.__init__`).
"""

import argparse
import gzip
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SOURCE_NAME = "open_clip/bpe_simple_vocab_16e6.txt.gz"
SOURCE_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
NUM_MERGES = 49_408 - 2 * 256 - 2  # all ids, less the byte symbols (plain and with `</w>`), less BOS and EOS
HEADER = "#version: 0.2"  # what the merges.txt files on the Hub start with
TARGET = Path(__file__).parents[1] / "clip_jax" / "tokenizers" / "data" / "clip_merges.txt.gz"


def download_wheel(folder: Path) -> Path:
    """Fetches the wheel into `folder` with pip and returns its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), "open_clip_torch"], check=True)
    return next(folder.glob("open_clip_torch-*.whl"))


def trimmed_merges(wheel: Path) -> bytes:
    """Returns a merges.txt of the merges that CLIP uses; exits if the source is another file."""
    with zipfile.ZipFile(wheel) as archive:
        source = archive.read(SOURCE_NAME)
    found = hashlib.sha256(source).hexdigest()
    if found != SOURCE_SHA256:
        sys.exit(f"{SOURCE_NAME} in {wheel.name}: expected sha256 {SOURCE_SHA256}, found {found}")
    merges = gzip.decompress(source).decode("utf-8").split("\n")[1 : 1 + NUM_MERGES]
    return "\n".join([HEADER, *merges, ""]).encode("utf-8")


def main() -> None:
    """Writes the data file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("wheel", type=Path, nargs="?", help="wheel of open_clip_torch; downloaded if not given")
    wheel = parser.parse_args().wheel
    with tempfile.TemporaryDirectory() as folder:
        merges = trimmed_merges(wheel or download_wheel(Path(folder)))
    TARGET.write_bytes(gzip.compress(merges, compresslevel=9, mtime=0))
    print(f"wrote {TARGET.name}: {len(merges):,} bytes of text, sha256 {hashlib.sha256(merges).hexdigest()}")


if __name__ == "__main__":
    main()
