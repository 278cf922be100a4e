"""Answers made up from text, as if an engine had drawn its tokens: for tests of what is written of an answer."""

import math

from gptoss_jax.engine.request import Event, FinishReason
from gptoss_jax.harmony import tokenizer
from gptoss_jax.harmony.answer import Answer, AnswerStream

WORDS = tokenizer.load_tokenizer()
OTHER = 13  # the id that each step reports beside the one that was drawn, if any is asked for


def ids_of(text: str) -> list[int]:
    """Token ids of text in which control tokens are spelled out."""
    return WORDS.encoding.encode(text, allowed_special="all")


def answer(
    text: str, *, stop: tuple[str, ...] = (), raw: bool = False, reason: FinishReason = "stop", top: bool = False
) -> Answer:
    """The answer of these tokens, ended by a stop string or for `reason`; step i has log probability -i/8."""
    stream = AnswerStream(WORDS, stop_strings=stop, raw=raw)
    for step, token in enumerate(ids_of(text)):
        ended = stream.ends_at(token)
        likely = (((token, -step / 8), (OTHER, -math.inf)),) if top else ()
        stream.take(Event(0, (token,), (-step / 8,), "stop" if ended else None, step, likely))
        if ended:
            break
    else:
        stream.take(Event(0, (), (), reason))
    return stream.finish()[0]


THOUGHT = "<|channel|>analysis<|message|>Hm, so.<|end|><|start|>assistant"
FINAL = THOUGHT + "<|channel|>final<|message|>Hello naïve 🙂 world<|return|>"
PREAMBLE = "<|channel|>commentary<|message|>I will look.<|end|><|start|>assistant"
CALL = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>'
CUT_CALL = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Par'
STRAY = "I cannot help.<|return|>"
WEATHER = {
    "name": "get_weather",
    "description": "Weather now",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
