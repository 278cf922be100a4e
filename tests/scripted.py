"""Models that say what a script holds: real checkpoints, run like any other, whose answers a test knows beforehand.

    python -m tests.scripted FOLDER [thinker|caller|agent|adder|attacker|attacking_caller]

A token's successor follows from the token and from whether the answer has begun to think: the embedding gives each
token of the script a dimension of its own, the unembedding maps it to the next token, and one attention head, looking
at all tokens alike, notes whether the first thought is among them. All else adds nothing. So a script may hold a token
once before its first thought and once after, and a prompt must not hold that thought.

An agent has a second script, which it follows once it has read a certain token: the result of its call.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from converters.random_model import random_tensors
from gptoss_jax.harmony import tokenizer
from tests.goldens.make import two_layers_config

CONFIG = two_layers_config() | {
    "vocab_size": tokenizer.VOCAB_SIZE,
    "eos_token_id": tokenizer.RETURN,
    "pad_token_id": tokenizer.ENDOFTEXT,
}
REASONING = "Hmm, why does sky look blue? Recall Rayleigh."
ANSWER = "Because air scatters short waves most: **blue** ✨"
CALL = '{"city": "Paris"}'
SUM, TOTAL = '{"a": 2, "b": 3}', "That makes five."
# Sequences that terminals obey: a title and a clipboard set, the screen cleared, the cursor moved.
CONTROL_REASONING = "Hmm, back\x08space"
CONTROL_ANSWER = "Title\x1b]0;owned\x07then\x9b2Jall\rgone."
CONTROL_CALL = '{"city": "Pa\x1b]52;c;aGk\x07ris"}'
_THINKING = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>"
_CALLING = (
    _THINKING.format("Hmm, weather") + "commentary to=functions.get_weather <|constrain|>json<|message|>{}<|call|>"
)
SCRIPTS = {
    "thinker": _THINKING.format(REASONING) + f"final<|message|>{ANSWER}<|return|>",
    "caller": _CALLING.format(CALL),
    "agent": _CALLING.format(CALL),
    # Two answers: a call, whose first token is the first thought here, and what it says once it has made it.
    "adder": f"<|channel|>commentary to=functions.add <|constrain|>json<|message|>{SUM}<|call|>"
    f"<|start|>assistant<|channel|>final<|message|>{TOTAL}<|return|>",
    "attacker": _THINKING.format(CONTROL_REASONING) + f"final<|message|>{CONTROL_ANSWER}<|return|>",
    "attacking_caller": _CALLING.format(CONTROL_CALL),
}
RESULT, CONCLUSION = "rain", "In Paris it rains."
AFTERWARDS = {"agent": (RESULT, f"<|channel|>final<|message|>{CONCLUSION}<|return|>")}
SURE, LESS_SURE, LEAST_SURE, SEEN, SEEN_RESULT, NOTE = 100.0, 90.0, 80.0, 10.0, 100.0, 40.0
LARGEST = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)


def script_ids(name: str) -> list[int]:
    """The token ids of an answer."""
    return _script(SCRIPTS[name])


def write(folder: Path, name: str, spoilt: str | None = None) -> Path:
    """A published checkpoint in the Hugging Face format whose model answers everything with a script.

    After the token `spoilt`, if given, its numbers are not finite: a large weight meets a large state.
    """
    said = [_ids("assistant")[0], *script_ids(name)]
    thought = said[said.index(tokenizer.MESSAGE) + 1]
    result, afterwards = AFTERWARDS.get(name, ("", ""))
    then = [said[0], *_script(afterwards)] if afterwards else []
    dimension = {token: i for i, token in enumerate(dict.fromkeys((*said, *then, *_ids(result))))}
    width = CONFIG["hidden_size"]
    # Of all tokens outside the script; of having seen the thought, and the result.
    other, seen, seen_result = width - 1, width - 2, width - 3
    assert len(dimension) <= seen_result

    tensors = {
        k: np.zeros_like(v) if "norm" not in k else np.ones_like(v) for k, v in random_tensors(CONFIG, 0).items()
    }
    embedding = np.zeros((CONFIG["vocab_size"], width))
    embedding[:, other] = 1
    unembedding = np.zeros_like(embedding)
    for token, i in dimension.items():
        embedding[token] = np.eye(width)[i]
    begun = False
    for token, following in pairwise(said):
        begun |= token == thought
        unembedding[following, dimension[token]] += LESS_SURE if begun else SURE
        unembedding[following, seen] = SEEN if begun else 0
    for token, following in pairwise(then):
        unembedding[following, dimension[token]] += LEAST_SURE
        unembedding[following, seen_result] = SEEN_RESULT
    for token in _ids(spoilt) if spoilt else ():
        embedding[token] *= 1e3
        unembedding[tokenizer.RETURN, dimension[token]] = LARGEST
    head = "model.layers.1.self_attn."
    tensors["model.embed_tokens.weight"], tensors["lm_head.weight"] = _half(embedding), _half(unembedding)
    tensors[head + "v_proj.weight"][0, dimension[thought]] = 1
    tensors[head + "o_proj.weight"][seen, 0] = NOTE
    for token in _ids(result):
        tensors[head + "v_proj.weight"][1, dimension[token]] = 1
        tensors[head + "o_proj.weight"][seen_result, 1] = NOTE
    tensors[head + "sinks"][:] = -1e4
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def _script(text: str) -> list[int]:
    return tokenizer.load_tokenizer().encoding.encode(text, allowed_special="all")


def _ids(text: str) -> list[int]:
    return tokenizer.load_tokenizer().encode(text)


def _half(array: np.ndarray) -> np.ndarray:
    return array.astype(ml_dtypes.bfloat16)


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "thinker")
