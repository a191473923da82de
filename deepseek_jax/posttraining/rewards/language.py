"""The language reward of R1: words in the language asked for, divided by all words.

DeepSeek-R1 (arXiv 2501.12948), section 2.3.2: "the proportion of target language words in the CoT", added to the
accuracy reward. The paper does not say what a word is. Here:

- A word is a run of letters of one script; marks (accents) and inner apostrophes belong to it. "don't" is one.
- In scripts that write no spaces (Han, kana, Thai, Lao, Khmer, Burmese) each letter is a word of its own.
- Latin and Greek letters of code between backticks, of mathematics between dollars and of commands of LaTeX are no
  language and not counted; letters of other scripts are, so they cannot hide there. Digits and signs are not counted.
  A run of one or two Latin letters is a name of a quantity as often as a word, and not counted.
- A word belongs to a language if its script does. So German passes for English: scripts are all that is looked at,
  which is what keeps a model from mixing Chinese into English, the case that the paper has.
"""

import re
import unicodedata

from deepseek_jax.posttraining.rewards.problem import Problem

# The scripts of a language, as the first word of the Unicode names of its letters.
SCRIPTS = {
    **dict.fromkeys(("en", "de", "fr", "es", "it", "pt", "nl", "pl", "tr", "vi", "id"), ("LATIN",)),
    **dict.fromkeys(("ru", "uk", "bg"), ("CYRILLIC",)),
    "zh": ("CJK",),
    "ja": ("CJK", "HIRAGANA", "KATAKANA"),
    "ko": ("HANGUL",),
    "ar": ("ARABIC",),
    "he": ("HEBREW",),
    "el": ("GREEK",),
    "hi": ("DEVANAGARI",),
    "th": ("THAI",),
}
WITHOUT_SPACES = {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"}
NO_LANGUAGE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\[A-Za-z]+|</?\w+>", re.DOTALL)
FORMAL = {"LATIN", "GREEK"}  # scripts of code and formulas
COUNTED_ANYWHERE = WITHOUT_SPACES.union(*SCRIPTS.values()) - FORMAL
SHORTEST_LATIN = 3  # letters


def script(letter: str) -> str:
    """Return the script of a letter: the first word of its Unicode name, "KATAKANA" for its half-width forms."""
    name = unicodedata.name(letter, "UNKNOWN")
    for prefix in ("HALFWIDTH ", "FULLWIDTH ", "IDEOGRAPHIC "):
        name = name.removeprefix(prefix)
    return name.partition(" ")[0].partition("-")[0]


def _without_formulas(match: re.Match) -> str:
    """Return a part that is no language, with a space for each character but the letters that are language anyway."""
    return "".join(
        letter if letter > "\x7f" and script(letter) in COUNTED_ANYWHERE else " " for letter in f" {match[0]} "
    )


def words(text: str) -> list[str]:
    """Return the script of each word of a text."""
    found: list[str] = []
    open_script, letters = "", 0  # of the word that is being read

    def close() -> None:
        if open_script and (open_script != "LATIN" or letters >= SHORTEST_LATIN):
            found.append(open_script)

    for character in NO_LANGUAGE.sub(_without_formulas, text):
        kind = unicodedata.category(character)
        if kind[0] == "M" or (character in "'’" and open_script):
            continue  # belongs to the letter before it
        of = script(character) if kind[0] == "L" else ""
        if of != open_script or of in WITHOUT_SPACES:
            close()
            open_script, letters = of, 0
        letters += 1
    close()
    return found


def language_reward(problem: Problem, text: str) -> float:
    """Return the share of the text's words that are in `problem.language`, from 0 to 1; 0 for a text without words.

    Raises:
        ValueError: the problem has no language, or one that is not in `SCRIPTS`.
    """
    if problem.language not in SCRIPTS:
        known = ", ".join(sorted(SCRIPTS))
        raise ValueError(f"problem {problem.name} has the language {problem.language!r}: one of {known}")
    found = words(text)
    return sum(word in SCRIPTS[problem.language] for word in found) / len(found) if found else 0.0
