"""Sums, differences, comparisons and products, with thoughts that spell digits, the least significant first.

A step for each digit with its carry is an easy question each time, and the operation is named first: a sum with a
number of one digit would else be taken for a product. What a step decides, a sign or whether to borrow, is written
after all that it follows from.
"""

from collections.abc import Sequence
from random import Random

from demo.question import Question, is_held_out, one_of, sign, thinking

SIZES = {(3, 3): 40, (3, 2): 12, (2, 3): 12, (2, 2): 12, (3, 1): 8, (1, 3): 8, (2, 1): 4, (1, 2): 3, (1, 1): 1}
"""Digits of two operands -> weight: numbers of unequal length are seen often enough."""


def addition(random: Random, held_out: bool) -> Question:
    """A sum of two numbers below 1000."""
    a, b = _pair(random, held_out, "addition")
    text = one_of(
        random,
        f"What is {a} + {b}?",
        f"{a} + {b} = ?",
        f"{a} + {b}",
        f"Compute {a} plus {b}.",
        f"What is {a} plus {b}?",
        f"Add {a} and {b}.",
        f"What do you get if you add {a} and {b}?",
        f"Please calculate {a} + {b}.",
    )
    return sum_of(a, b, text)


def sum_of(a: int, b: int, text: str) -> Question:
    """A sum that is asked for by a given text."""
    steps, digits = add_digits(_digits(a, b), _digits(b, a))
    high = f"Add. {_spelled(a, b)}, {_spelled(b, a)}. {', '.join(steps)}. {_written(digits)}."
    medium = f"Add. {', '.join(steps)}. {_written(digits)}."
    return Question("addition", text, f"{a} + {b} = {a + b}.", a + b, thinking(high, medium))


def subtraction(random: Random, held_out: bool) -> Question:
    """A difference of two numbers below 1000, which is not negative."""
    a, b = sorted(_pair(random, held_out, "subtraction"), reverse=True)
    text = one_of(
        random,
        f"What is {a} - {b}?",
        f"{a} - {b} = ?",
        f"{a} - {b}",
        f"Compute {a} minus {b}.",
        f"What is {a} minus {b}?",
        f"Subtract {b} from {a}.",
        f"Please calculate {a} - {b}.",
    )
    return difference_of(a, b, text)


def difference_of(a: int, b: int, text: str) -> Question:
    """A difference that is asked for by a given text; `b` is not larger than `a`."""
    steps, digits = _subtract_digits(_digits(a, b), _digits(b, a))
    high = f"Subtract. {_spelled(a, b)}, {_spelled(b, a)}. {', '.join(steps)}. {_written(digits)}."
    medium = f"Subtract. {', '.join(steps)}. {_written(digits)}."
    return Question("subtraction", text, f"{a} - {b} = {a - b}.", a - b, thinking(high, medium))


def comparison(random: Random, held_out: bool) -> Question:
    """The larger or smaller of two numbers below 1000; often they begin with the same digits."""
    a, b = _unlike_pair(random, held_out)
    word = one_of(random, "larger", "smaller")
    text = one_of(
        random,
        f"Which is {word}, {a} or {b}?",
        f"Which number is {word}: {a} or {b}?",
        f"What is the {word} of {a} and {b}?",
        f"{a} or {b}: which one is {word}?",
    )
    steps = ", ".join(_compare_digits(_digits(a, b)[::-1], _digits(b, a)[::-1]))
    value = max(a, b) if word == "larger" else min(a, b)
    found = f"{steps}. {word}: {'first' if value == a else 'second'}, {value}."
    thoughts = thinking(f"Compare. {_spelled(a, b)}, {_spelled(b, a)}. {found}", f"Compare. {found}")
    return Question("comparison", text, f"{value} is {word}.", value, thoughts)


def product_by_digit(random: Random, held_out: bool) -> Question:
    """A number of two or three digits times one of one digit."""
    while True:
        a, b = random.randint(100, 999) if random.random() < 0.8 else random.randint(10, 99), random.randint(2, 9)
        if is_held_out("product_by_digit", a, b) == held_out:
            break
    steps, digits = _multiply_digits(_digits(a), b)
    high = f"Multiply. {a}={_written(_digits(a))}, {b}. {', '.join(steps)}. {_written(digits)}."
    medium = f"Multiply. {', '.join(steps)}. {_written(digits)}."
    return _product("product_by_digit", random, a, b, high, medium)


def product_two_digits(random: Random, held_out: bool) -> Question:
    """A product of two numbers of two digits."""
    while True:
        a, b = random.randint(10, 99), random.randint(10, 99)
        if is_held_out("product_two_digits", *sorted((a, b))) == held_out:
            break
    first, ones = _multiply_digits(_digits(a), b % 10)
    second, tens = _multiply_digits(_digits(a), b // 10)
    tens = [0, *tens]
    width = max(len(ones), len(tens))
    steps, digits = add_digits(_wide(ones, width), _wide(tens, width))
    lines = f"{', '.join(first)}. {_written(ones)}; {', '.join(second)}. {_written(tens)}; {', '.join(steps)}"
    high = f"Multiply. {a}={_written(_digits(a))}, {b}={_written(_digits(b))}. {lines}. {_written(digits)}."
    medium = f"Multiply. {a} times {b % 10}: {_written(ones)}; {b // 10}: {_written(tens)}. {_written(digits)}."
    return _product("product_two_digits", random, a, b, high, medium)


def _product(family: str, random: Random, a: int, b: int, high: str, medium: str) -> Question:
    x, y = (a, b) if family == "product_two_digits" or random.random() < 0.8 else (b, a)
    text = one_of(
        random,
        f"What is {x} * {y}?",
        f"{x} * {y} = ?",
        f"What is {x} times {y}?",
        f"Multiply {x} by {y}.",
        f"Compute {x} times {y}.",
        f"Please calculate {x} * {y}.",
    )
    return Question(family, text, f"{x} * {y} = {a * b}.", a * b, thinking(high, medium))


# ---- operands ----


def _pair(random: Random, held_out: bool, family: str) -> tuple[int, int]:
    """Two numbers whose lengths are drawn first; both orders of a pair are held out, or neither."""
    while True:
        lengths = random.choices(list(SIZES), list(SIZES.values()))[0]
        a, b = (_number(random, length) for length in lengths)
        if is_held_out(family, *sorted((a, b))) == held_out:
            return a, b


def _unlike_pair(random: Random, held_out: bool) -> tuple[int, int]:
    while True:
        a, b = (_number(random, length) for length in random.choices(list(SIZES), list(SIZES.values()))[0])
        if random.random() < 0.4:
            b = min(999, max(0, a + random.choice((-1, 1)) * random.choice((1, 2, 3, 10, 20, 30, 90))))
        if a != b and is_held_out("comparison", *sorted((a, b))) == held_out:
            return a, b


def _number(random: Random, length: int) -> int:
    return random.randint(10 ** (length - 1) if length > 1 else 0, 10**length - 1)


# ---- digits, the least significant first ----


def _digits(number: int, beside: int = 0) -> list[int]:
    """Those of a number, with zeros as far as another number beside it goes."""
    return [int(digit) for digit in reversed(str(number).zfill(len(str(beside))))]


def _wide(digits: list[int], width: int) -> list[int]:
    return digits + [0] * (width - len(digits))


def _written(digits: Sequence[int]) -> str:
    """As people write them: the most significant first."""
    return " ".join(map(str, reversed(digits)))


def _spelled(number: int, beside: int) -> str:
    return f"{number}={_written(_digits(number, beside))}"


def add_digits(a: Sequence[int], b: Sequence[int]) -> tuple[list[str], list[int]]:
    """The steps of a sum, and its digits, from the last digit on."""
    carry, steps, digits = 0, [], []
    for x, y in zip(a, b, strict=True):
        total = x + y + carry
        steps.append(f"{x}+{y}{f'+{carry}' if carry else ''}={total}")
        digits.append(total % 10)
        carry = total // 10
    return steps, digits + ([carry] if carry else [])


def _subtract_digits(a: Sequence[int], b: Sequence[int]) -> tuple[list[str], list[int]]:
    borrowed, steps, digits = 0, [], []
    for x, y in zip(a, b, strict=True):
        borrows = x - y - borrowed < 0
        left = x + 10 * borrows - y - borrowed
        less = f"-{y}{f'-{borrowed}' if borrowed else ''}"
        steps.append(f"{x}{less}:{x + 10}{less}={left}" if borrows else f"{x}{less}={left}")
        digits.append(left)
        borrowed = int(borrows)
    return steps, digits


def _multiply_digits(digits: Sequence[int], by: int) -> tuple[list[str], list[int]]:
    carry, steps, product = 0, [], []
    for x in digits:
        total = x * by + carry
        steps.append(f"{x}*{by}={x * by}{f'+{carry}={total}' if carry else ''}")
        product.append(total % 10)
        carry = total // 10
    return steps, product + ([carry] if carry else [])


def _compare_digits(a: Sequence[int], b: Sequence[int]) -> list[str]:
    """Pairs of digits from the first on, each with its sign after it, up to the one that decides."""
    steps = []
    for x, y in zip(a, b, strict=True):
        steps.append(f"{x} {y} {sign(x, y)}")
        if x != y:
            break
    return steps
