"""Whole numbers in English words, for answers that are asked for so."""

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()


def in_words(number: int) -> str:
    """A number from 0 to 9999: 675 is "six hundred seventy-five"."""
    if number < 20:
        return _SMALL[number]
    if number < 100:
        ones = f"-{_SMALL[number % 10]}" if number % 10 else ""
        return _TENS[number // 10] + ones
    size, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    rest = f" {in_words(number % size)}" if number % size else ""
    return f"{in_words(number // size)} {name}{rest}"
