"""The demo model's data: right answers, well-formed conversations, and questions that nobody trains on."""

import datetime
import json
import operator
import re
from collections import Counter
from random import Random

import pytest

from demo import conversations, data, facts, functions, instructions, sorting, unknown, words
from demo.number_words import in_words
from demo.question import Question
from demo.word_list import WORDS
from gptoss_jax.harmony import messages, tokenizer
from gptoss_jax.harmony.parser import StreamParser
from gptoss_jax.harmony.tokenizer import load_tokenizer

COUNT = 300
FAMILIES = list(conversations.QUESTIONS)


def questions(family: str, *, held_out: bool = False, count: int = COUNT) -> list[Question]:
    """Questions of a family, the same ones each time."""
    random = Random(family)
    return [conversations.question(random, held_out, family) for _ in range(count)]


def numbers(text: str) -> list[int]:
    """Those in a text."""
    return [int(number) for number in re.findall(r"\d+", text)]


@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_questions_are_never_trained(family):
    """Guards the table of results: a question seen in training would show memory, not skill."""
    trained = {asked.text.strip() for asked in questions(family, count=3000)}
    kept = {asked.text.strip() for asked in questions(family, held_out=True, count=300)}
    assert trained & kept == set()


@pytest.mark.parametrize("family", list(conversations.CALLS))
def test_held_out_calls_are_never_trained(family):
    """Guards the table of calls in the same way."""
    random = Random(0)
    asked = [{functions.MAKERS[family](random, held).text for _ in range(2000)} for held in (False, True)]
    assert not asked[0] & asked[1]


def test_operands_of_whole_conversations_are_disjoint():
    """Guards sums inside of other shapes, such as a later turn, against training on a pair that is held out."""
    pairs = [set[tuple[int, ...]](), set[tuple[int, ...]]()]
    for held_out in (False, True):
        for example in data.examples(300, seed=5, held_out=held_out):
            finals = re.findall(r'"(\d+ [+] \d+) = ', json.dumps(example.document))
            pairs[held_out] |= {tuple(sorted(numbers(final))) for final in finals}
    assert pairs[True] and not pairs[False] & pairs[True]


@pytest.mark.parametrize(
    ("family", "sign", "compute"),
    [
        ("addition", "+", operator.add),
        ("subtraction", "-", operator.sub),
        ("product_by_digit", "*", operator.mul),
        ("product_two_digits", "*", operator.mul),
    ],
)
def test_arithmetic_is_right(family, sign, compute):
    """Guards answers and every step of the thoughts against a wrong carry."""
    for asked in questions(family):
        a, b, result = numbers(asked.sentence)
        assert asked.sentence == f"{a} {sign} {b} = {result}." and result == compute(a, b) == asked.value
        assert sorted(numbers(asked.text)) == sorted((a, b))
        for thoughts in asked.thoughts.values():
            _check_steps(thoughts)
            assert int(thoughts.rsplit(". ", 1)[1].rstrip(".").replace(" ", "")) == result
            for first, ten in re.findall(r"(\d)[\d-]*:(\d+)-", thoughts):
                assert sign == "-" and int(ten) == int(first) + 10


def _check_steps(thoughts: str) -> None:
    for steps, total in re.findall(r"\b(\d[\d+*-]*\d)=(\d+)\b(?! \d)", thoughts):
        first, *rest = re.split(r"(?=[+*-])", steps)
        value = int(first)
        for part in rest:
            value = {"+": operator.add, "-": operator.sub, "*": operator.mul}[part[0]](value, int(part[1:]))
        assert len(rest) == 0 or value == int(total), thoughts


def test_comparisons_are_right():
    """Guards larger against smaller, and the steps up to the digits that decide."""
    for asked in questions("comparison"):
        word = "larger" if "larger" in asked.text else "smaller"
        operands = numbers(asked.text)
        assert asked.value == (max if word == "larger" else min)(operands)
        assert asked.sentence == f"{asked.value} is {word}."
        for thoughts in asked.thoughts.values():
            steps, found = thoughts.removesuffix(".").split(". ")[-2:]
            pairs = re.findall(r"(\d) (\d) ([=<>])", steps)
            assert all(sign == ("=" if x == y else ">" if x > y else "<") for x, y, sign in pairs)
            assert [sign == "=" for *_, sign in pairs] == [True] * (len(pairs) - 1) + [False]
            place = ("first", "second")[int(asked.value != operands[0])]
            assert found == f"{word}: {place}, {asked.value}"


def test_letters_are_right():
    """Guards counts and letters against a word that is not the one asked for."""
    for asked in questions("counting"):
        letter, word = re.findall(r"letter (\w) occurs \d+ times? in (\w+)", asked.sentence)[0]
        assert asked.value == sum(each == letter for each in word) and word in asked.text
    for family, step in (("spelling", 1), ("reversing", -1)):
        for asked in questions(family):
            assert isinstance(asked.value, list)
            word = "".join(map(str, asked.value))[::step]
            assert word in WORDS and re.search(rf"\b{word}\b", asked.text)
            assert asked.sentence.split(": ")[-1].split(" are ")[-1] == " ".join(map(str, asked.value)) + "."


@pytest.mark.parametrize("family", ["sorting_numbers", "sorting_words"])
def test_sorting_is_right(family):
    """Guards the order, and that a going through the digits or the alphabet leads to it."""
    for asked in questions(family):
        thoughts, down = asked.thoughts["high"], "largest first" in asked.thoughts["high"]
        assert isinstance(asked.value, list) and len(asked.value) <= len(sorting.LABELS)
        assert asked.value == sorted(asked.value, reverse=down)
        assert all(re.search(rf"\b{value}\b", asked.text) for value in asked.value)
        sort, listed, passes, ranked, result = re.split(r"\. ?", thoughts.rstrip("."))
        found = re.findall(r"([A-F]) ?(\w+) (\w) ([A-F])", listed)
        stands_for = {label: text for label, text, _, _ in found}
        width = max(map(len, stands_for.values())) if family == "sorting_numbers" else 0
        assert all(label == again and first == text.zfill(width)[0] for label, text, first, again in found)
        placed = re.findall(r"(first|second|third|fourth|fifth|sixth) ([A-F])", passes)
        assert [f"{rank} {stands_for[label]}" for rank, label in placed] == [
            re.sub(r" [A-F] ?", " ", part) for part in ranked.split(", ")
        ]
        assert result == ", ".join(map(str, asked.value)) == ", ".join(stands_for[label] for _, label in placed)
        assert sort == f"Sort, {'largest' if down else 'smallest'} first"


def test_ties_are_shown_as_far_as_they_go():
    """Guards the hardest of the thoughts: numbers that begin alike."""
    asked = sorting.numbers_of([147, 142, 822, 139], "Sort.", down=False)
    assert asked.thoughts["high"].split(". ")[2] == (
        "0 1 A B D: A4 B4 = D3 > A7 B2 > D9 < smallest: first D second B third A; 2 3 4 5 6 7 8 C: fourth C; 9"
    )
    assert asked.value == [139, 142, 147, 822]


def test_numbers_in_words():
    """Guards the spelled numbers at their seams."""
    shown = {
        0: "zero",
        13: "thirteen",
        40: "forty",
        99: "ninety-nine",
        100: "one hundred",
        675: "six hundred seventy-five",
    }
    shown |= {1000: "one thousand", 8019: "eight thousand nineteen"}
    assert {number: in_words(number) for number in shown} == shown


@pytest.mark.parametrize("family", list(conversations.CALLS))
def test_calls_have_right_arguments(family):
    """Guards calls against arguments that the declared schema does not have, and results against wrong dates."""
    random = Random(1)
    for _ in range(COUNT):
        call = functions.MAKERS[family](random, False)
        schema = call.tool["function"]["parameters"]
        types = {"string": str, "integer": int, "number": (int, float)}
        assert json.loads(call.written_arguments) == call.arguments
        assert list(call.arguments) == list(schema["properties"]) == schema["required"]
        for name, value in call.arguments.items():
            assert isinstance(value, types[schema["properties"][name]["type"]])
        assert any(str(value) in call.sentence for value in call.result.values())
        if "weekday" in call.result:
            (date,) = call.arguments.values()
            assert datetime.date.fromisoformat(date).strftime("%A") == call.result["weekday"]


def test_there_are_fifty_facts_in_several_wordings():
    """Guards the number of questions about the project, and that each is trained in two wordings at least."""
    assert len(facts.FACTS) >= 50
    assert all(len(wordings) >= 2 for wordings, _ in facts.FACTS.values())


def test_what_is_held_out_of_the_unknown_has_kinds_of_its_own():
    """Guards the share of "I do not know": it must hold for kinds of questions that were never trained."""
    kept = [asked.text for asked in questions("unknown", held_out=True)]
    assert sum("Who painted" in text or "Prove that" in text for text in kept) > 5
    assert not set(unknown.TEMPLATES) & set(unknown.HELD_OUT_TEMPLATES)
    assert all(asked.sentence.startswith(unknown.DOES_NOT_KNOW) for asked in questions("unknown"))


def test_the_unknown_word_is_one_token_and_known_words_are():
    """Guards the trick of the unknown word: it must stand at one row, and words must be single tokens."""
    encode = load_tokenizer().encode
    assert len(encode(f" {unknown.UNKNOWN}")) == 1 and unknown.UNKNOWN not in WORDS
    assert all(len(encode(f" {word}")) == 1 for word in WORDS) and len(set(WORDS)) == len(WORDS)


def test_conversations_are_well_formed_harmony():
    """Guards training: every conversation renders, fits a row, and parses back without a fault."""
    encode = load_tokenizer()
    for example in data.examples(200, seed=2, held_out=False):
        ids = conversations.token_ids(example.document)
        assert len(ids) <= conversations.MOST_TOKENS
        last = len(ids) - ids[::-1].index(tokenizer.START)  # the last message, as the model writes it
        parser = StreamParser(encode)
        for token in ids[last + 1 :]:
            parser.feed(token)
        parser.flush()
        parsed = parser.result()
        assert parsed.parse_status == "ok", (parsed, example.document)


def test_efforts_think_longer():
    """Guards the meaning of the efforts: none, some, all of the thoughts."""
    for family in FAMILIES:
        for asked in questions(family, count=50):
            lengths = [len(asked.thoughts.get(effort, "")) for effort in ("low", "medium", "high")]
            assert lengths[0] == 0 and lengths[0] < lengths[1] <= lengths[2]


def test_families_and_shapes_are_all_there():
    """Guards the mixture: a family that is never drawn is never learned."""
    drawn = list(data.examples(1000, seed=0, held_out=False))
    families = Counter(example.family for example in drawn)
    assert families.keys() == conversations.QUESTIONS.keys() | conversations.CALLS.keys()
    assert min(families.values()) > 3
    assert Counter(example.shape for example in drawn).keys() == conversations.SHAPES.keys() | {"call"}


def test_json_answers_have_the_asked_form():
    """Guards JSON answers against a key or type that the schema does not have."""
    random = Random(4)
    for family in FAMILIES:
        for asked in questions(family, count=30):
            wanted = instructions.asked_json(random, asked)
            schema = wanted.response_format["json_schema"]["schema"]
            answer = json.loads(wanted.answer)
            assert list(answer) == schema["required"]
            types = {"string": str, "integer": int, "array": list, "boolean": bool}
            assert all(isinstance(answer[key], types[value["type"]]) for key, value in schema["properties"].items())


def test_more_of_a_family_is_drawn_where_it_is_asked_for():
    """Guards the second part of the recipe, on what is hardest: the others must go on being drawn."""
    found = []
    for more in ((), ("unknown",)):
        drawn = [example.family for example in data.examples(120, seed=0, held_out=False, more=more)]
        found.append(drawn.count("unknown") / len(drawn))
    assert found[0] < 0.15 < found[1] < 0.4 and len(set(drawn)) > 10


def test_a_date_changes_nothing_but_the_system_message():
    """Guards the harmony form of a conversation against losing tools, effort or thoughts."""
    for example in data.examples(100, seed=6, held_out=False):
        if "reasoning_effort" not in example.document:
            continue
        with_date = conversations.dated(example.document, "2026-11-29")
        text = load_tokenizer().decode(conversations.token_ids(with_date))
        plain = load_tokenizer().decode(conversations.token_ids(example.document))
        assert text.replace("Current date: 2026-11-29\n", "") == plain


def test_the_command_writes_the_same_bytes_again(tmp_path):
    """Guards the recipe: the same seed must give the same data, which `--messages` takes."""
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        data.write(file, count=50, seed=3, held_out=True)
    assert files[0].read_bytes() == files[1].read_bytes()
    for line in files[0].read_text().splitlines():
        assert messages.from_json(json.loads(line)).messages


def test_every_word_is_asked_for():
    """Guards a word whose letters are never shown: nothing could spell it."""
    seen = {word for asked in questions("spelling", count=20000) for word in asked.text.strip("?.").split()}
    assert set(WORDS) <= seen and len(words.SPELLING) > 1
