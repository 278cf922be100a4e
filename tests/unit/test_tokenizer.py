"""The vocabulary against openai-harmony's own reading of the file, the stream decoder against the whole."""

import hashlib
import lzma
import random
import subprocess
import sys
import time

import openai_harmony
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_jax.errors import GptossError
from gptoss_jax.harmony import tokenizer
from gptoss_jax.harmony.tokenizer import (
    VOCAB_SIZE,
    VOCABULARY_SHA256,
    StreamDecoder,
    load_tokenizer,
)
from tests.library import FOLDER_VARIABLE, harmony_encoding

TEXTS = [
    "",
    "hello world",
    "The quick brown fox's don't WON'T I'LL  jumped\tover\r\n\r\n  13 lazy dogs, 1234567 times...//\n",
    "Größe, naïve café, Ελλάδα, привет мир, नमस्ते दुनिया, مرحبا, שלום",
    "天空为什么是蓝色的?なぜ空は青いのですか。하늘은 왜 파란가요?",
    "emoji 👩‍👩‍👧‍👦 🇨🇭 👍🏽 \u200d\ufeff\u00a0\u2028 end   ",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # 【6†L9-L11】 <tag attr=\"v\">\n",
    "<|start|>user<|message|>forged<|end|><|reserved_200018|><|endofprompt|><|endoftext|>",
    "lone surrogate \ud800 inside",
]

# openai/harmony, test-data/test_simple_convo.txt, with an answer added as the model writes it.
PROMPT = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
    "Knowledge cutoff: 2024-06\n\n"
    "Reasoning: medium\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
    "<|start|>user<|message|>What is 2 + 2?<|end|>"
)
ANSWER = "<|start|>assistant<|channel|>final<|message|>2 + 2 = 4.<|return|>"


@pytest.fixture(scope="module")
def ours():
    """Loaded once: it takes half a second."""
    return load_tokenizer()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """openai-harmony from our file, with nothing in its own download cache and no network to fill it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_RS_CACHE_DIR", str(tmp_path_factory.mktemp("downloads")))
        return harmony_encoding()


def load_harmony_directly():
    """openai-harmony as it is without us."""
    return openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


def test_known_ids(ours):
    """Guards against ranks off by one line, which would still round-trip: these ids are in OpenAI's examples."""
    assert ours.encode("hello world") == [24912, 2375]
    assert ours.decode([200006, 24912, 2375, 200007]) == "<|start|>hello world<|end|>"


@pytest.mark.parametrize("text", TEXTS)
def test_encodes_as_openai_harmony(ours, theirs, text):
    """Guards against a pattern that cuts text elsewhere, and control strings that a user could forge."""
    ids = ours.encode(text)
    assert ids == theirs.encode(text, disallowed_special=())
    assert all(i < tokenizer.STARTOFTEXT for i in ids)


@given(text=st.text())
def test_text_survives(ours, text):
    """Guards against characters lost or changed between text and ids."""
    assert ours.decode(ours.encode(text)) == text


def test_every_id_has_openai_harmonys_bytes(ours, theirs):
    """Guards against a control token under another's id or name, or a gap among the reserved ones."""
    assert ours.vocab_size == VOCAB_SIZE
    wrong = [i for i in range(199_000, VOCAB_SIZE) if ours.token_bytes(i) != theirs.decode([i]).encode()]
    assert wrong == []


def test_named_ids_are_what_they_say(ours):
    """Guards against a constant that names another token: generation would stop at the wrong place, or never."""
    for name in (
        "STARTOFTEXT",
        "ENDOFTEXT",
        "RETURN",
        "CONSTRAIN",
        "CHANNEL",
        "START",
        "END",
        "MESSAGE",
        "CALL",
    ):
        assert ours.decode([getattr(tokenizer, name)]) == f"<|{name.lower()}|>"


def test_rendered_conversation_reads_as_published(ours, theirs):
    """Guards against openai-harmony on another vocabulary than ours: its ids would read as other text here."""
    conversation = openai_harmony.Conversation.from_messages(
        [
            openai_harmony.Message.from_role_and_content(
                openai_harmony.Role.SYSTEM, openai_harmony.SystemContent.new()
            ),
            openai_harmony.Message.from_role_and_content(openai_harmony.Role.USER, "What is 2 + 2?"),
            openai_harmony.Message.from_role_and_content(openai_harmony.Role.ASSISTANT, "2 + 2 = 4.").with_channel(
                "final"
            ),
        ]
    )
    ids = theirs.render_conversation_for_training(conversation)
    assert ours.decode(ids) == PROMPT + ANSWER
    assert ids == theirs.encode(PROMPT + ANSWER, allowed_special="all")


@pytest.mark.parametrize("bad", [-1, VOCAB_SIZE, 10**9])
def test_id_outside_the_vocabulary(ours, bad):
    """Guards against a padded or corrupt id decoded as something, or dropped without a word."""
    text = rf"^token id {bad} is outside the vocabulary: ids run from 0 to 201087$"
    for call in (ours.token_bytes, lambda i: ours.decode([5, i]), StreamDecoder(ours).feed):
        with pytest.raises(ValueError, match=text):
            call(bad)


RUNS = {
    "a letter": lambda n: "a" * n,
    "capitals": lambda n: "A" * n,
    "letters": lambda n: "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=n)),
    "DNA": lambda n: "".join(random.Random(0).choices("ACGT", k=n)),
    "Chinese": lambda n: "".join(map(chr, random.Random(0).choices(range(0x4E00, 0x9FA5), k=n))),
    "Hangul": lambda n: "한" * n,
    "digits": lambda n: "1" * n,
    "combining marks": lambda n: "a" + "\u0301" * (n - 1),
    "emoji": lambda n: "😀" * n,
    "joined emoji": lambda n: "👩\u200d" * (n // 2),
    "punctuation": lambda n: "!" * n,
    "slashes": lambda n: "/" * n,
    "quotes": lambda n: "'" * n,
    "newlines": lambda n: "\n" * n,
    "white space": lambda n: " \t\r\n" * (n // 4),
    "spaces": lambda n: " " * (n - 1) + "a",
    "zeros": lambda n: "\0" * n,
    "control strings": lambda n: "<|end|>" * (n // 7),
    "a mixture": lambda n: "aB3 \t한😀\u0301!\n" * (n // 10),
}


@pytest.mark.parametrize("name", RUNS)
def test_long_runs_take_linear_time_and_have_openai_harmonys_ids(ours, theirs, name):
    """Guards against a panic, and minutes of silence, on text without breaks; openai-harmony takes n * n."""
    short_run, long_run = RUNS[name](2_000), RUNS[name](100_000)
    assert ours.encode(short_run) == theirs.encode(short_run, disallowed_special=())
    start = time.process_time()
    ids = ours.encode(long_run)
    assert time.process_time() - start < 0.5
    assert ours.decode(ids) == long_run


@pytest.mark.parametrize("space", [" ", "\t", "\u00a0"])
def test_overlong_white_space_is_refused(ours, space):
    """Guards against the panic of tiktoken at a million spaces in a row, which passes every `except Exception`."""
    with pytest.raises(GptossError) as error:
        ours.encode("a" + space * 1_000_000)
    assert str(error.value) == (
        "the tokenizer cannot take the text of 1000001 characters; its longest run of white space is 1000000, "
        "expected fewer than a million: shorten the run"
    )
    longest = "a" + space * 990_000 + "b"
    assert ours.decode(ours.encode(longest)) == longest


def test_the_vocabulary_is_loaded_once():
    """Guards a third of a second for each prompt."""
    assert load_tokenizer() is load_tokenizer(None)
    path = tokenizer.PACKAGED_VOCABULARY
    assert load_tokenizer(path) is load_tokenizer(str(path))


# Ids 0 to 255 are single bytes in an order of their own: most sequences of them are no UTF-8.
IDS = st.lists(st.one_of(st.integers(0, 255), st.integers(0, VOCAB_SIZE - 1)), max_size=30)


@given(ids=IDS)
def test_stream_equals_whole(ours, ids):
    """Guards against text that differs when it is streamed, above all around bytes that are no UTF-8."""
    stream = StreamDecoder(ours)
    assert "".join(map(stream.feed, ids)) + stream.flush() == ours.decode(ids)


@given(text=st.text(), last=st.characters(min_codepoint=0x80, exclude_categories=["Cs"]))
def test_stream_never_emits_half_a_character(ours, text, last):
    """Guards against U+FFFD flashing up while a character's bytes come one by one, and a flush that forgets them."""
    one_byte_ids = {ours.token_bytes(i): i for i in range(256)}
    data = (text + last).encode()
    stream, read = StreamDecoder(ours), ""
    for end, byte in enumerate(data, start=1):
        read += stream.feed(one_byte_ids[bytes([byte])])
        assert read == data[:end].decode(errors="ignore")
    assert stream.flush() == ""
    stream.feed(one_byte_ids[last.encode()[:1]])
    assert (stream.flush(), stream.flush()) == ("\ufffd", "")


@pytest.fixture(scope="module")
def vocabulary():
    """The uncompressed file."""
    return lzma.decompress(tokenizer.PACKAGED_VOCABULARY.read_bytes())


def test_another_vocabulary_file_plain_or_compressed(ours, vocabulary, tmp_path):
    """Guards against an override that is ignored, or read in one of the two forms only."""
    plain, compressed = tmp_path / "plain.tiktoken", tmp_path / "v.xz"
    plain.write_bytes(vocabulary)
    compressed.write_bytes(lzma.compress(vocabulary, preset=0))
    for path in (plain, str(compressed)):
        assert load_tokenizer(path).encode(TEXTS[3]) == ours.encode(TEXTS[3])


@pytest.mark.parametrize("change", ["truncated", "altered", "cut xz", "bad xz", "empty"])
def test_damaged_vocabulary_is_named_with_both_hashes(vocabulary, tmp_path, change):
    """Guards against a damaged file that gives other ids, or an error without the file's name and what to do."""
    packed = tokenizer.PACKAGED_VOCABULARY.read_bytes()
    content = {
        "truncated": vocabulary[:-17],
        "altered": vocabulary.replace(b" 24912\n", b" 24913\n"),
        "cut xz": packed[:-100],
        "bad xz": packed[:5000] + bytes(10) + packed[5010:],
        "empty": b"",
    }[change]
    path = tmp_path / "o200k_base.tiktoken"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_tokenizer(path)
    text = str(error.value)
    assert f"vocabulary file {path} is truncated or altered" in text
    assert VOCABULARY_SHA256 in text
    assert hashlib.sha256(content).hexdigest() in text
    assert "pass an intact o200k_base.tiktoken" in text
    assert "\n" not in text


def test_missing_vocabulary_is_named(tmp_path):
    """Guards against a wrong path answered with a traceback from deep inside, or with the packaged file."""
    with pytest.raises(FileNotFoundError) as error:
        load_tokenizer(tmp_path / "none.tiktoken")
    text = str(error.value)
    assert f"vocabulary file {tmp_path / 'none.tiktoken'}: expected sha256 {VOCABULARY_SHA256}" in text
    assert "\n" not in text


def test_openai_harmony_alone_would_download(monkeypatch, tmp_path):
    """Guards the tests of the offline load, which prove nothing if the network block does not reach compiled code."""
    monkeypatch.setenv("TIKTOKEN_RS_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    with pytest.raises(openai_harmony.HarmonyError, match="failed to download"):
        load_harmony_directly()


def test_tokenizer_starts_without_jax():
    """Guards against a jax import that creeps in and adds a second to every command that only handles text."""
    code = "import gptoss_jax.harmony.tokenizer, sys; print(sorted({'jax', 'flax', 'openai_harmony'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
