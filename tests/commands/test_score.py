"""`score`: log probabilities of given text, against the logits, against what generating reported, and as a command."""

import functools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gptoss_jax
from gptoss_jax.engine.request import NumericsError, RequestError
from gptoss_jax.harmony import tokenizer
from gptoss_jax.runtime.scoring import Windows, score_in_windows, summary
from tests import processes
from tests.gate import TinyModel
from tests.goldens import make as golden

SMALL = golden.two_layers_config()
WORDY = SMALL | {"vocab_size": 201_088, "eos_token_id": 200_002, "pad_token_id": 199_999}
IDS = golden.token_ids(600, seed=5).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two layers in float32."""
    return gptoss_jax.load(TinyModel(SMALL).write(tmp_path_factory.mktemp("score")), dtype="float32")


@pytest.fixture(scope="module")
def wordy(tmp_path_factory):
    """A folder with the real vocabulary, for text."""
    return TinyModel(WORDY).write(tmp_path_factory.mktemp("wordy"))


def test_scores_are_the_logits_own(model):
    """Guards the shift by one and the chunks: each token's log probability, and the alternatives, by the logits."""
    found = model.score(IDS, top_logprobs=3)
    exact = golden.log_softmax(model.logits(IDS))[:-1]
    np.testing.assert_allclose(found.logprobs, exact[np.arange(599), IDS[1:]], atol=1e-4)
    order = np.argsort(-exact, axis=-1)[:, :3]
    np.testing.assert_array_equal(found.top_ids, order)
    np.testing.assert_allclose(found.top_logprobs, np.take_along_axis(exact, order, -1), atol=1e-4)
    assert model.score(IDS[:9]).top_ids.shape == (8, 0)


def test_scores_are_what_generating_reported(model):
    """Guards one forward for both: what was drawn scores as it did when it was drawn."""
    events = list(model.generate(IDS[:40], max_new_tokens=30, seed=3, stop_ids=()))
    drawn = [token for event in events for token in event.token_ids]
    reported = [logprob for event in events for logprob in event.logprobs]
    np.testing.assert_allclose(model.score(IDS[:40] + drawn).logprobs[39:], reported, atol=1e-4)


@given(st.integers(2, 60), st.data())
def test_windows_score_each_token_once_with_enough_before_it(size, data):
    """Guards long texts: no token left out or counted twice, none with less context than promised."""
    stride = data.draw(st.integers(1, size - 1))
    length = data.draw(st.integers(2, 300))
    scored = []
    for first, end, at in Windows(size, stride).over(length):
        assert end - first <= size
        assert first == 0 or at - first >= size - stride
        scored += range(at, end)
    assert scored == list(range(1, length))


def test_a_long_text_is_scored_in_windows(model):
    """Guards the cut of each window's part: every token after exactly its window's tokens."""
    found = score_in_windows(functools.partial(model.score, top_logprobs=2), IDS[:100], Windows(40, 25))
    assert found.logprobs.shape == (99,)
    assert found.top_ids.shape == (99, 2)
    for first, end, at in Windows(40, 25).over(100):
        part = model.score(IDS[first:end], top_logprobs=2)
        np.testing.assert_array_equal(found.logprobs[at - 1 : end - 1], part.logprobs[at - first - 1 :])
        np.testing.assert_array_equal(found.top_ids[at - 1 : end - 1], part.top_ids[at - first - 1 :])


def test_perplexity_is_that_of_a_uniform_model():
    """Guards the summary's arithmetic: a model that knows nothing of V ids has perplexity V."""
    found = summary(np.full(1000, -math.log(512), np.float32))
    assert found.perplexity == pytest.approx(512, rel=1e-6)
    assert found.total_logprob == pytest.approx(-1000 * math.log(512), rel=1e-6)
    assert summary(np.full(2, -1e6, np.float32)).perplexity == math.inf


def test_what_cannot_be_scored_is_refused(model):
    """Guards the messages, and a broken model against passing as an unlikely text."""
    with pytest.raises(RequestError, match="1 tokens to score, expected at least 2: the first has none before it"):
        model.score([1])
    with pytest.raises(RequestError, match="token id 512 at position 1 names no token, expected 0 to 511"):
        model.score([0, 512])
    with pytest.raises(RequestError, match="top_logprobs is 21, expected 0 to 20"):
        model.score([1, 2], top_logprobs=21)
    sound = model.params["norm"]
    try:
        model.params["norm"] = sound * np.nan
        with pytest.raises(NumericsError, match="after token 0: logits are not finite; check the checkpoint"):
            model.score([1, 2, 3])
    finally:
        model.params["norm"] = sound


def _score(folder, *arguments, text="") -> processes.Done:
    environment = {"XDG_CACHE_HOME": str(folder / "home")}
    return processes.run("gptoss_jax.score", "--checkpoint", folder, *arguments, stdin=text, environment=environment)


def test_the_command_prints_what_the_library_gives(wordy, tmp_path):
    """Guards the command: a text from stdin and lines of a file, as text and as JSON."""
    text = "The sky is blue.\n\nGrüße, 世界!\u2028More.\n"  # U+2028 ends no line
    ran = _score(wordy, "--json", "--top-logprobs", 2, text=text)
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    vocabulary = tokenizer.load_tokenizer()
    ids = vocabulary.encode(text.removesuffix("\n"))
    exact = gptoss_jax.load(wordy).score(ids, top_logprobs=2)
    (found,) = document["texts"]
    assert found["token_ids"] == ids
    assert "".join(found["tokens"]) == vocabulary.decode(ids)
    assert found["logprobs"][0] is None
    np.testing.assert_allclose(found["logprobs"][1:], exact.logprobs, rtol=1e-6)
    assert [pair[0] for pair in found["top_logprobs"][1]] == exact.top_ids[0].tolist()
    assert document["perplexity"] == pytest.approx(math.exp(-np.mean(exact.logprobs, dtype=np.float64)))
    assert "RANDOM" in ran.stderr

    file = tmp_path / "lines.txt"
    file.write_text(text)
    ran = _score(wordy, "--file", file, "--lines", "--tokens")
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    counts = [len(vocabulary.encode(line)) - 1 for line in text.split("\n") if line]
    assert [line for line in lines if "perplexity" in line] == [lines[counts[0]], lines[-2], lines[-1]]
    assert lines[-1].startswith(f"all: {sum(counts)} tokens, log probability -")
    assert lines[0].split()[:2] == ["1", str(vocabulary.encode("The sky")[1])]


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        (["one text", "--text", "another"], "", "a text and --text: expected one of them"),
        (["two", "texts"], "", "unexpected argument 'texts': a text of several words goes in quotes"),
        ([], "", "stdin holds no text (--help lists the ways to give one)"),
        (["a"], "", "the text is 1 token long, expected at least 2: the first has none before it"),
        (["--token-ids", "1,x"], "", "--token-ids is '1,x', expected whole numbers such as 1,2,3"),
        (["--token-ids", "1,200019"], "", "token id 200019 at position 1 names no token, expected 0 to 200018"),
        (["a text", "--stride", "4096"], "", "--stride is 4096, expected 1 to 4095, below --max-context-tokens"),
        (["a text", "--json", "--top-logprobs", "21"], "", "--top-logprobs is 21, expected 0 to 20"),
        (["a text", "--top-logprobs", "2"], "", "--top-logprobs has an effect with --json only: give both"),
        (["a text", "--tokens", "--json"], "", "--tokens and --json: leave one of them out"),
        (["--token-ids", "1,2", "--lines"], "", "--token-ids and --lines: leave one of them out"),
        (["--file", ""], "", "--file is empty, expected the name of a file"),
        (["a \udcff text"], "", "the text is not valid UTF-8"),
        (
            [],
            b"a \xff text",
            "stdin is not valid UTF-8 at byte 2; if it is in Windows' older encoding, "
            "`iconv -f WINDOWS-1252 -t UTF-8` converts it",
        ),
        (["\n \n", "--lines"], "", "the text holds no line that is not empty"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, text, message, wordy):
    """Guards tracebacks, and reading weights for what the flags show to be wrong."""
    done = _score(wordy, *arguments, text=text)
    assert done == (2, "", f"score: {message}\n")
