"""Writes tokens.json: what transformers 5's CLIPTokenizer makes of hard strings, for both pad tokens.

    PYTHONPATH=. python tests/golden/make_token_golden.py

`ids` are those of pad `<|endoftext|>`, truncated to 77 and not padded; `ids_pad_0`, where they differ, those
of pad `!`.
"""

import json
import random
from pathlib import Path

import tokenizers
import transformers

from clip_jax.tokenizers.pipeline import packaged_vocabulary

TARGET = Path(__file__).parent / "tokens.json"
NUM_RANDOM = 240

# Characters that editors may change or hide are escaped.
# fmt: off
HARD = [
    "", " ", "   ", "\n", "\t \r\n", "\xa0", "\u3000", "\u200b", "\ufeff", "\u2028", "\x85", "\x1c",
    "\x00", "a\x00b", "a photo of a cat", "A Photo OF a CAT", "  a   photo\n\tof\xa0a\u3000cat  ",
    "A  CAFÉ, it's 12", "a cat!", "wow! !!", "!", "!!", "!!!", "! ! !", "a!b", "?!", "!?", "!?!",
    "¡hola!", "!\u0301", "！", "‼", "!." * 9, "<|endoftext|>", "<|startoftext|>", "a<|endoftext|>b",
    "a <|endoftext|> b", "<|startoftext|>a<|endoftext|>", "<|EndOfText|>", "<|ENDOFTEXT|>",
    "<|endoftext|", "|endoftext|>", "<<|endoftext|>>", "<|endoftext|>!", "<| endoftext |>",
    "<|endoftext|><|endoftext|>", "<|STARTOFTEXT|>", "<|endoftext|>'s", "<|pad|>", "</w>", "cat</w>",
    "it's", "IT'S", "don't", "don’t", "we'll've", "I'm", "you'd", "they're", "'s", "''s", "s'",
    "'S'T'RE", "o'clock", "İ", "İstanbul", "i\u0307", "ı", "ß", "ẞ", "STRASSE", "ΟΔΟΣ", "ΣΑΣ", "ς", "Σ",
    "ǅ", "ŉ", "ΐ", "\u212a", "\u212b", "\u2126",
    "cafe\u0301", "café", "CAFE\u0301!", "e\u0301\u0323", "e\u0323\u0301",
    "\u0301", "a\u0301\u0301\u0301", "\u0344", "한국어", "\u1112\u1161\u11ab\u1100\u116e\u11a8",
    "가나다", "猫咪", "日本語のテキスト", "カﾞ", "がぎぐ", "か\u3099", "кошка", "КОШКА", "Ёлка", "й",
    "и\u0306", "γάτα", "γατα\u0301", "ქართული", "ᲥᲐᲠᲗᲣᲚᲘ", "Ꭰ", "ꭰ", "ԱՐԵՒ", "և", "قطة", "חתול",
    "ש\u05b8\u05c1לו\u05b9ם", "\u202eabc\u202c", "م\u064eر\u0652ح\u064eب\u064bا",
    "ह\u093fन\u094dद\u0940", "क\u093c", "\u0958", "ไทย", "བ\u0f7cད", "\u0f73", "தம\u0bbfழ\u0bcd", "١٢٣",
    "१२३", "１２３", "①②③", "Ⅳ", "ⅷ", "½", "3²", "𝟘𝟙", "〇一二三", "1234567890", "3.14", "1,000",
    "v2.0-beta", "😀", "👍🏽", "👨\u200d👩\u200d👧\u200d👦", "🏳\ufe0f\u200d🌈", "🇩🇪", "1\ufe0f\u20e3",
    "❤\ufe0f", "☺", "x\u200dy", "x\u200by", "x\u200cy", "👩\u200d", "🐱!🐱", "𝕬𝖓𝖌𝖊𝖑", "𐐀", "𐐨",
    "\U0001d15e", "\U0010ffff", "\uffff", "�", "\ue000", "\U000e0041", "\u0378", "ﬁne", "ﬀ", "a_b__c",
    "a-b--c", "#hashtag", "@user", "http://example.com/a?b=c&d=%20", "&amp; &lt;", "“q”", "‘q’", "a…b",
    "(a:1.2)", "((a))", "[a|b]", "{a}", "a, b, c", "a,b,c", "a.b.c", "...", "--", "***", "100%", "$5",
    "€5", "~`^", "\\(a\\)", "supercalifragilisticexpialidocious", "z" * 12, "qwrtpsdfghjkl", "aA" * 20,
    "ab" * 60, "x y " * 60, "cat " * 75, "cat " * 76, "! " * 80, "!" * 80, "猫" * 40, "é" * 90,
    "😀" * 30, "masterpiece, best quality, " * 12, "\x01\x02\x7f", "\x1b[0m", "a\xadb", "a\u2060b",
    "\u061c", "\ufe0f", "\u20e3", "®", "™", "µ", "ª", "º", "¼", "×",
]
# fmt: on


def random_texts(count: int) -> list[str]:
    """Joins pieces of the hard strings, with a fixed seed."""
    rng = random.Random(0)
    pieces = [text[:12] for text in HARD if text]
    joints = ["", "", " ", "  ", "\n", "!", ", ", "\u0301", "'s "]
    texts = []
    for _ in range(count):
        chosen = rng.sample(pieces, rng.randint(2, 5))
        texts.append("".join(piece + rng.choice(joints) for piece in chosen))
    return texts


def main() -> None:
    """Writes the golden file."""
    vocab, merges = packaged_vocabulary()
    plain, pad_0 = (
        transformers.CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad) for pad in ("<|endoftext|>", "!")
    )
    cases = []
    for text in [*HARD, *random_texts(NUM_RANDOM)]:
        case = {"text": text, "ids": plain(text, max_length=77, truncation=True).input_ids}
        ids_pad_0 = pad_0(text, max_length=77, truncation=True).input_ids
        if ids_pad_0 != case["ids"]:
            case["ids_pad_0"] = ids_pad_0
        cases.append(case)
    versions = {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    TARGET.write_text(f'{{"versions": {json.dumps(versions)},\n"cases": [\n{lines}\n]}}\n', encoding="ascii")
    print(f"wrote {len(cases)} cases, {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
