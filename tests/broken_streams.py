"""Harmony streams broken in any way: seeds, and edits of their ids, for all that must survive them."""

from hypothesis import strategies as st

from gptoss_jax.harmony.tokenizer import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    ENDOFPROMPT,
    ENDOFTEXT,
    MESSAGE,
    RETURN,
    START,
    STARTOFTEXT,
    VOCAB_SIZE,
    Tokenizer,
)

THOUGHT = "<|channel|>analysis<|message|>hm<|end|>"
NEXT = "<|start|>assistant"
FINAL = "<|channel|>final<|message|>Answer<|return|>"
CALL_WEATHER = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city":"Bern"}<|call|>'

SEEDS = [
    THOUGHT + NEXT + FINAL,
    THOUGHT + NEXT + CALL_WEATHER,
    '<|channel|>commentary to=browser.search code<|message|>{"query": 1}<|call|><|start|>browser.search to=assistant'
    f"<|channel|>commentary<|message|>Zürich 🦩<|end|>{NEXT} to=python<|channel|>analysis code<|message|>1<|call|>",
    NEXT + '<|channel|>final <|constrain|>json<|message|>{"a": "🦩"}<|return|>',
    "<|channel|>analysis I think<|channel|>final It is 4.<|return|>",
    "I'm sorry, but I can't help with that.<|return|>",
    "<|channel|>to=functions.f<|message|>{}<|call|>",
    "<|channel|>commentary to=assistant<|channel|>final<|message|>Hello!<|return|>",
    THOUGHT
    + NEXT
    + " to=assistant<|channel|>final<|message|>To myself<|end|>"
    + NEXT
    + " to=functions.<|channel|>commentary<|message|>{}<|call|>",
    "<|channel|>commentary<|constrain|>json to=functions.f<|message|>{}<|end|><|start|>user:ann<|message|>x<|end|>",
]
HEADER_WORDS = "to=x to= assistant user functions final analysis commentary to code json = . { 🦩\n"
CONTROL = [START, END, MESSAGE, CHANNEL, CONSTRAIN, RETURN, CALL, ENDOFTEXT, STARTOFTEXT, ENDOFPROMPT, VOCAB_SIZE - 1]
EDITS = ("delete", "duplicate", "swap", "control", "header", "byte", "any", "truncate", "splice")
WHICH = st.integers(0, len(SEEDS) - 1)
MUTATIONS = st.lists(st.integers(0, 2**32), min_size=1, max_size=6)  # integers are drawn faster than tuples


def mutated(ids, edits, header_ids, other):
    """Apply edits, each a number that says what is done, where, and with how many ids or with which."""
    ids = list(ids)
    for edit in edits:
        rest, kind = divmod(edit, len(EDITS))
        number, at = divmod(rest, len(ids) + 1)
        match EDITS[kind]:
            case "delete":
                del ids[at : at + 1 + number % 3]
            case "duplicate":
                ids[at:at] = ids[at : at + 1 + number % 3]
            case "swap":
                ids[at : at + 2] = ids[at : at + 2][::-1]
            case "truncate":
                del ids[at:]
            case "splice":
                ids[at:] = other[number % len(other) :]
            case "control":
                ids.insert(at, CONTROL[number % len(CONTROL)])
            case "header":
                ids.insert(at, header_ids[number % len(header_ids)])
            case "byte":
                ids.insert(at, number % 256)
            case "any":
                ids.insert(at, number % VOCAB_SIZE)
    return ids


def spelled(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of text in which control strings are control tokens, unlike `Tokenizer.encode`."""
    return tokenizer.encoding.encode(text, allowed_special="all")


def seeds(tokenizer: Tokenizer) -> tuple[list[list[int]], list[int]]:
    """Ids of `SEEDS`, and of words that mean something in headers."""
    return [spelled(tokenizer, seed) for seed in SEEDS], spelled(tokenizer, HEADER_WORDS)
