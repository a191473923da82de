"""Words behind a number: those that multiply it, its unit, and those that are none."""

import re

SHORT_UNITS = {
    "cm",
    "m",
    "km",
    "mm",
    "in",
    "ft",
    "yd",
    "mi",
    "g",
    "kg",
    "mg",
    "lb",
    "oz",
    "l",
    "ml",
    "s",
    "h",
    "am",
    "pm",
}
MULTIPLES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# Words that deny, choose, or change the number before them. "quarters" are not among them: they are coins, too.
NO_UNIT = """
or and not is to than but maybe either nor if except instead possibly probably perhaps unless without
about almost around approximately nearly false true wrong incorrect unknown none nothing never
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety
half halves third thirds fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths
tenth tenths hundredth hundredths thousandth thousandths millionth millionths billionth billionths
plus minus times over less more greater fewer negative positive divided multiplied remainder mod modulo base
squared cubed factorial choose power root pi pie sqrt nan inf infinity infinite imaginary
sin cos tan cot csc sine cosine tangent arcsin arccos arctan log ln exp
"""
NO_UNITS = frozenset(NO_UNIT.split())


def read(text: str) -> tuple[int, str | None]:
    """Return what "thousand" and its like before a unit multiply by, and the unit; None if the words are no unit."""
    words, multiple = re.split("[ /]", text.lower()), 1
    while words and (factor := MULTIPLES.get(words[0].removesuffix("s"))):
        words, multiple = words[1:], multiple * factor
    good = all(len(word) > 2 or word in SHORT_UNITS for word in words)
    if words != ["times"] and not (good and (NO_UNITS | MULTIPLES.keys()).isdisjoint(words)):
        return 1, None
    return multiple, " ".join(map(_singular, words))


def _singular(word: str) -> str:
    """Return the same for one and for several: "box" for box and boxes, "mil" for mile and miles, "foot" for feet."""
    if len(word) < 3:
        return word
    if word == "feet":
        return "foot"
    if word.endswith("s") and not word.endswith(("ss", "us")):
        word = word[:-1]
    return word[:-1] + "i" if word.endswith("y") else word.removesuffix("e")
