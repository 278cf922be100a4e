"""Conversations -> examples: what is learned, as inference would see it; what is wrong, before training; the corpus."""

import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard
from openai_harmony import Role

from gptoss_jax.files import FileError
from gptoss_jax.harmony import messages, render
from gptoss_jax.harmony.settings import Settings
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.training import corpus
from gptoss_jax.training.examples import Example, ExampleMaker
from gptoss_jax.training.jsonl import DataError
from gptoss_jax.training.options import CHANNELS

ROOT = Path(__file__).parents[2]
TOOL = {"type": "function", "function": {"name": "area", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "area", "arguments": '{"side": 2}'}}
OTHER_CALL = {"type": "function", "function": {"name": "side", "arguments": "{}"}}


def said(role: str, content: str = "", **fields: object) -> dict[str, object]:
    """A message in OpenAI's form."""
    return {"role": role, **({"content": content} if content else {}), **fields}


PLAIN = [said("user", "Hi"), said("assistant", "Hello", reasoning="Greet.")]
TURNS = [*PLAIN, said("user", "Bye"), said("assistant", "See you", thinking="Part.")]
TOOLS = [
    said("user", "Area?"),
    said("assistant", "Let me see.", reasoning_content="A call.", tool_calls=[CALL]),
    said("tool", "4"),
    said("assistant", "Four", reasoning="Say it."),
    said("user", "Sure?"),
    said("assistant", "Yes", reasoning="It is."),
]
PARALLEL = [
    said("user", "Both?"),
    said("assistant", tool_calls=[CALL, OTHER_CALL]),
    said("tool", "4", name="area"),
    said("tool", "2", name="side"),
    said("assistant", "4 and 2"),
]
LEFT = [said("user", "Area?"), said("assistant", reasoning="A call.", tool_calls=[CALL]), *PLAIN, said("user", "And?")]
CUT = [
    {"role": "user", "content": "Count"},
    {"role": "assistant", "channel": "analysis", "content": "Simple."},
    {"role": "assistant", "channel": "final", "content": "1 2", "is_cut": True},
]
CONVERSATIONS = {
    "plain": PLAIN,
    "turns": TURNS,
    "tools": {"messages": TOOLS, "tools": [TOOL], "reasoning_effort": "low"},
    "parallel": PARALLEL,
    "left": LEFT,
    "cut": CUT,
    "instructed": [said("system", "Be brief."), *TURNS],
}


def made(document: object, channels: tuple[str, ...] = CHANNELS) -> list[Example]:
    """The examples of a JSON conversation."""
    return ExampleMaker(channels).examples(messages.from_json(document))


def marked(example: Example) -> str:
    """The text from the first user's message on, what is learned in «»."""
    tokenizer, text = load_tokenizer(), ""
    for is_learned, run in itertools.groupby(
        zip(example.ids, example.learned, strict=True), key=lambda token: token[1]
    ):
        part = tokenizer.decode([token for token, _ in run])
        text += f"«{part}»" if is_learned else part
    return text[text.index("<|start|>user") :].replace("<|", "<").replace("|>", ">")


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (
            PLAIN,
            [
                "<start>user<message>Hi<end><start>assistant«<channel>analysis<message>Greet.<end>"
                "<start>assistant<channel>final<message>Hello<return>»"
            ],
        ),
        (
            TURNS,
            [
                "<start>user<message>Hi<end><start>assistant«<channel>analysis<message>Greet.<end>"
                "<start>assistant<channel>final<message>Hello<return>»",
                "<start>user<message>Hi<end><start>assistant<channel>final<message>Hello<end>"
                "<start>user<message>Bye<end><start>assistant«<channel>analysis<message>Part.<end>"
                "<start>assistant<channel>final<message>See you<return>»",
            ],
        ),
        (
            TOOLS,
            [
                "<start>user<message>Area?<end><start>assistant«<channel>analysis<message>A call.<end>"
                "<start>assistant<channel>commentary<message>Let me see.<end>"
                "<start>assistant to=functions.area<channel>commentary <constrain>json<message>"
                '{"side": 2}<call>»<start>functions.area to=assistant<channel>commentary<message>4<end>'
                "<start>assistant«<channel>analysis<message>Say it.<end>"
                "<start>assistant<channel>final<message>Four<return>»",
                "<start>user<message>Area?<end>"
                "<start>assistant<channel>commentary<message>Let me see.<end>"
                "<start>assistant to=functions.area<channel>commentary <constrain>json<message>"
                '{"side": 2}<call><start>functions.area to=assistant<channel>commentary<message>4<end>'
                "<start>assistant<channel>final<message>Four<end><start>user<message>Sure?<end>"
                "<start>assistant«<channel>analysis<message>It is.<end>"
                "<start>assistant<channel>final<message>Yes<return>»",
            ],
        ),
        (
            PARALLEL,
            [
                "<start>user<message>Both?<end>"
                "<start>assistant« to=functions.area<channel>commentary <constrain>json<message>"
                '{"side": 2}<call>»<start>assistant« to=functions.side<channel>commentary <constrain>json<message>'
                "{}<call>»<start>functions.area to=assistant<channel>commentary<message>4<end>"
                "<start>functions.side to=assistant<channel>commentary<message>2<end>"
                "<start>assistant«<channel>final<message>4 and 2<return>»"
            ],
        ),
        (
            LEFT,
            [
                "<start>user<message>Area?<end><start>assistant«<channel>analysis<message>A call.<end>"
                "<start>assistant to=functions.area<channel>commentary <constrain>json<message>"
                '{"side": 2}<call>»<start>user<message>Hi<end>'
                "<start>assistant«<channel>analysis<message>Greet.<end>"
                "<start>assistant<channel>final<message>Hello<return>»"
            ],
        ),
        (
            CUT,
            [
                "<start>user<message>Count<end><start>assistant«<channel>analysis<message>Simple.<end>"
                "<start>assistant<channel>final<message>1 2»"
            ],
        ),
    ],
    ids=["plain", "turns", "tools", "parallel", "left", "cut"],
)
def test_what_is_learned(document, expected):
    """Guards the loss against users' and tools' words, and against answers whose thoughts or ends are missing."""
    assert list(map(marked, made(document))) == expected


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        (("analysis",), ["A call.", "Say it.", "It is."]),
        (("commentary",), ["Let me see.", '{"side": 2}']),
        (("final",), ["Four", "Yes"]),
        (("analysis", "final"), ["A call.", "Say it.", "Four", "It is.", "Yes"]),
    ],
)
def test_channels_that_are_learned(channels, expected):
    """Guards the flag: other channels are read, and learned neither in their text nor in their headers."""
    texts, learned = [], ""
    for example in made(TOOLS, channels):
        learned += "".join(part.split("»")[0] for part in marked(example).split("«")[1:])
    for part in learned.split("<message>")[1:]:
        texts.append(part.partition("<")[0])
    assert texts == expected
    assert all(f"<channel>{channel}" not in learned for channel in set(CHANNELS) - set(channels))


def test_a_header_that_the_model_draws_is_learned_with_its_message():
    """Guards `<|start|>assistant` after thoughts, which no prompt gives, where thoughts are not learned."""
    (example,) = made(PLAIN, ("final",))
    assert marked(example).endswith("Greet.<end>«<start>assistant<channel>final<message>Hello<return>»")


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_each_turn_is_learned_as_inference_would_see_it(name):
    """Guards prompts: what stands before a learned part is what `render` gives to an engine at that place."""
    conversation = messages.from_json(CONVERSATIONS[name])
    settings = render.resolve(Settings(), (), conversation)
    prompts = {
        tuple(render.render(conversation.messages[:index], settings))
        for index, message in enumerate(conversation.messages)
        if message.author.role is Role.ASSISTANT and not render_draws(conversation.messages, index)
    }
    found = set()
    for example in made(CONVERSATIONS[name]):
        flags = [0, *example.learned]
        begins = [i for i in range(len(example.ids)) if flags[i + 1] and not flags[i]]
        found |= {tuple(example.ids[:begin]) for begin in begins}
    assert found == prompts


def render_draws(conversation, index: int) -> bool:
    """Whether the model draws a message in one go with the one before it."""
    before = conversation[index - 1]
    return before.author.role is Role.ASSISTANT and before.recipient is None


def test_kept_openings_are_those_of_the_conversation():
    """Guards the cache of beginnings: one with other tools, effort or instructions must not be taken."""
    documents = [
        {"messages": PLAIN, "reasoning_effort": effort, "tools": tools}
        for effort, tools in itertools.product(("low", "high"), ([], [TOOL]))
    ]
    documents += [[said("developer", "Rhyme."), *PLAIN], *documents]
    maker = ExampleMaker()
    for document in documents:
        conversation = messages.from_json(document)
        ids = render.render(conversation.messages, render.resolve(Settings(), (), conversation), for_completion=False)
        assert maker.examples(conversation)[0].ids[:-1] == ids[:-1]


# ---- files ----


def write(path: Path, *documents: object) -> str:
    """A file of JSON lines; its name."""
    path.write_text("".join(f"{json.dumps(document)}\n" for document in documents))
    return str(path)


def refused(names: list[str], row_tokens: int = 200, channels: tuple[str, ...] = CHANNELS) -> list[str]:
    """The lines of the error that the files get."""
    with pytest.raises(DataError) as error:
        corpus.read(names, row_tokens=row_tokens, channels=channels)
    return str(error.value).splitlines()


def test_all_faults_are_named_before_training(tmp_path, monkeypatch):
    """Guards a run of hours against the conversation that would end it, and people against one fault at a time."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(
        json.dumps(PLAIN) + '\n{"messages": \n\n' + json.dumps([said("user", "Hi")]) + "\n"
        '[{"role": "user", "content": "Hi", "mood": "good"}]\n'
        + json.dumps([said("user", "word " * 200), said("assistant", "Yes")])
        + '\n{"messages": []}\n7\n'
    )
    Path("empty.jsonl").write_text("\n\n")
    Path("zeros.jsonl").write_bytes(bytes(50))
    assert refused(["a.jsonl", "empty.jsonl", "absent.jsonl", "zeros.jsonl"]) == [
        "a.jsonl, line 2: column 14: Expecting value; expected JSON",
        "a.jsonl, line 4: the assistant says nothing, expected a message of role 'assistant' to learn",
        "a.jsonl, line 5: message 0 has 'mood', expected only role, content, name: put what it says in one of these, "
        "or take it out if it does not matter",
        "a.jsonl, line 6: the conversation has 262 tokens, expected at most the 200 of a row: take longer rows, or "
        "shorten it",
        "a.jsonl, line 7: the line has no 'messages', or an empty one",
        "a.jsonl, line 8: the line is 7, expected an object with some of messages, tools, response_format, "
        "reasoning_effort",
        "empty.jsonl: holds no conversation, expected one a line",
        "absent.jsonl: no such file",
        "zeros.jsonl: filled with zeros, as a crash or a broken download leaves it: fetch it again",
    ]


def test_many_faults_of_a_kind_are_one_line(tmp_path):
    """Guards a terminal against a line for each of 300,000 conversations."""
    name = write(tmp_path / "a.jsonl", PLAIN, *[[said("user", "Hi")]] * 25)
    (line,) = refused([name])
    assert line == (
        f"{name}, line 2: the assistant says nothing, expected a message of role 'assistant' to learn "
        "(and 24 more like it)"
    )


def test_channels_that_nobody_speaks_on(tmp_path):
    """Guards a run that would learn nothing; conversations without these channels among others are only counted."""
    name = write(tmp_path / "a.jsonl", PLAIN, [said("user", "Hi"), said("assistant", "Hello")])
    assert refused([name], channels=("commentary",)) == [
        f"{name}: the assistant says nothing on the channels to learn in any conversation: choose others"
    ]
    read = corpus.read([name], row_tokens=200, channels=("analysis",))
    assert len(read) == 1
    assert read.remarks == ("1 of 2 conversations: nothing on the channels to learn",)


def test_remarks_are_counted(tmp_path):
    """Guards keys that were passed over: named once, with how many conversations had them."""
    name = write(tmp_path / "a.jsonl", *[{"messages": PLAIN, "id": str(i)} for i in range(3)])
    assert corpus.read([name], row_tokens=200).remarks == (
        "3 of 3 conversations: ignored, since the prompt has no place for it: 'id'",
    )


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_a_corpus_holds_its_examples(tmp_path, pack):
    """Guards offsets, flags and line numbers, over several files, packed ones and blank lines."""
    first, second = tmp_path / "a.jsonl", tmp_path / "b"
    write(first, TURNS, PLAIN)
    second.write_bytes(pack(b"\n" + json.dumps(PARALLEL).encode() + b"\n"))
    read = corpus.read([str(first), str(second)], row_tokens=200)
    expected = [*made(TURNS), *made(PLAIN), *made(PARALLEL)]
    assert len(read) == len(expected)
    for index, example in enumerate(expected):
        part = slice(*read.offsets[index : index + 2])
        assert read.ids[part].tolist() == example.ids
        assert read.learned[part].tolist() == list(map(bool, example.learned))
    where = [(str(first), 1), (str(first), 1), (str(first), 2), (str(second), 2)]
    assert list(map(read.where, range(4))) == [f"{name}, line {line}" for name, line in where]
    assert read.conversations == 3


def test_a_kept_corpus_is_read_again_only_if_something_changed(tmp_path, monkeypatch):
    """Guards a resume: the same arrays without the files being read; new ones for other bytes, channels or rows."""
    name, folder = write(tmp_path / "a.jsonl", TURNS), tmp_path / "run" / "corpus"
    first = corpus.kept(folder, [name], row_tokens=200)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "read", None)
        again = corpus.kept(folder, [name], row_tokens=200)
        assert corpus.open_kept(folder, first.key).key == again.key == first.key
    read = corpus.read([name], row_tokens=200)
    for field in ("ids", "learned", "offsets", "lines", "digests"):
        assert isinstance(getattr(again, field), np.memmap)
        assert np.array_equal(getattr(again, field), getattr(read, field))
    assert (again.files, again.conversations, again.remarks) == (read.files, read.conversations, read.remarks)
    others = [
        corpus.kept(folder, [name], row_tokens=201),
        corpus.kept(folder, [name], row_tokens=200, channels=("final",)),
        corpus.kept(folder, [write(tmp_path / "a.jsonl", TURNS, PLAIN)], row_tokens=200),
    ]
    assert len({first.key, *(other.key for other in others)}) == 4
    assert sorted(path.name for path in folder.iterdir()) == sorted({first.key, *(other.key for other in others)})


def test_a_damaged_kept_corpus_is_refused(tmp_path):
    """Guards a resume against arrays that a full disk cut, and against another version's."""
    name, folder = write(tmp_path / "a.jsonl", TURNS), tmp_path / "corpus"
    key = corpus.kept(folder, [name], row_tokens=200).key
    ids = folder / key / "ids.npy"
    whole = ids.read_bytes()
    ids.write_bytes(whole[:-8])
    with pytest.raises(FileError, match="damaged"):
        corpus.open_kept(folder, key)
    np.save(ids, np.zeros(3, np.int32))
    with pytest.raises(FileError, match="the arrays do not belong together"):
        corpus.open_kept(folder, key)
    ids.write_bytes(whole)
    record = folder / key / "corpus.json"
    record.write_text(record.read_text().replace('"format": 1', '"format": 0'))
    with pytest.raises(FileError, match="another version's corpus"):
        corpus.open_kept(folder, key)
    with pytest.raises(DataError, match="absent: no such file"):
        corpus.kept(folder, [str(tmp_path / "absent")], row_tokens=200)


def test_a_share_is_held_out_by_the_lines_hash(tmp_path):
    """Guards validation: equal lines on one side, all examples of a line too, whatever else is in the file."""
    numbered = [[said("user", f"{i}?"), said("assistant", f"{i}"), *TURNS] for i in range(100)]
    read = corpus.read([write(tmp_path / "a.jsonl", *numbered, *numbered[:7])], row_tokens=200)
    train, held_out = read.split(0.2)
    assert 10 < len(held_out) / 3 < 35
    assert len(train) + len(held_out) == len(read) == 3 * 107
    assert not set(train.digests.tolist()) & set(held_out.digests.tolist())
    assert train.conversations + held_out.conversations == 107
    fewer = corpus.read([write(tmp_path / "b.jsonl", *numbered[::-2])], row_tokens=200).split(0.2)[1]
    assert set(fewer.digests.tolist()) <= set(held_out.digests.tolist())


def test_parts_hold_the_examples_that_were_taken(tmp_path):
    """Guards the gather of tokens: offsets of one example's neighbours."""
    read = corpus.read([write(tmp_path / "a.jsonl", TURNS, PARALLEL, PLAIN, LEFT)], row_tokens=200)
    part = read.take(np.array([4, 0, 2]))
    for index, source in enumerate((0, 2, 4)):
        one, other = slice(*part.offsets[index : index + 2]), slice(*read.offsets[source : source + 2])
        assert part.ids[one].tolist() == read.ids[other].tolist()
        assert part.learned[one].tolist() == read.learned[other].tolist()
        assert part.where(index) == read.where(source)
    with pytest.raises(DataError, match="leaves none for validation: choose another"):
        part.split(0.0)


def test_data_is_read_without_jax():
    """Guards the first seconds of a command, in which what is wrong with its files is said."""
    code = "import sys, gptoss_jax.training.packing, gptoss_jax.training.vocabulary; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "False\n"
