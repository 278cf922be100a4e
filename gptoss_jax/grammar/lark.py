"""Writes the grammar of one harmony message in llguidance's Lark: its header in every variant, and what is held of it.

A message of free text (reasoning, preambles, a final answer or a built-in tool's program that nobody holds) ends, for
the grammar, where its body begins: from there on `matcher` needs none.
"""

import json
import re
from collections.abc import Iterator

from gptoss_jax.grammar.forms import AnswerForm, Body
from gptoss_jax.harmony.tokenizer import CALL, CHANNEL, CONSTRAIN, MESSAGE, RETURN, START

# White space is bounded, so that no answer is blanks for ever: nothing, a space, or a line's end and its indentation.
WHITESPACE = r"( |\n {0,32})?"
_RECIPIENTS = {"python": '"python"', "browser": '"browser." ("search" | "open" | "find")'}


def message_grammar(form: AnswerForm, *, coerced: frozenset[Body] = frozenset()) -> str:
    """The grammar of a message from its `<|start|>` on, as an answer of this form may hold it.

    Args:
        form: what is held.
        coerced: bodies in which `oneOf` is to be read as `anyOf`.
    """
    rules = [f'start: {_id(START)} "assistant" message']
    kinds, bodies = [f'{_id(CHANNEL)} "analysis" {_id(MESSAGE)}'], dict[Body, str]()
    if form.calls or form.builtin_tools:
        kinds.append(f'{_id(CHANNEL)} "commentary" {_id(MESSAGE)}')
    if form.final == "free":
        kinds.append(f'{_id(CHANNEL)} "final" {_id(MESSAGE)}')
    elif form.final is not None:
        name = bodies.setdefault(form.final, "body_0")
        kinds.append(f'{_id(CHANNEL)} "final" json? {_id(MESSAGE)} {name} {_id(RETURN)}')
    for function, body in form.calls:
        name = bodies.setdefault(body, f"body_{len(bodies)}")
        kinds += [f"{header} {name} {_id(CALL)}" for header in _call_headers(f'"{function}"', "functions.")]
    for tool in form.builtin_tools:
        kinds += _call_headers(_RECIPIENTS[tool], "")
    rules.append("message: " + "\n  | ".join(kinds))
    rules.append(f'json: " "? {_id(CONSTRAIN)} " "? "json" | " json"')
    rules.append(f'code: " "? {_id(CONSTRAIN)} " "? ("code" | "json") | " code"')
    for body, name in bodies.items():
        rules += _body_rules(body, name, coerce=body in coerced)
    return "\n".join(rules) + "\n"


def _call_headers(recipient: str, namespace: str) -> Iterator[str]:
    """Headers of a call: the recipient before the channel, as the format has it, or after, as models write it too."""
    kind = "json" if namespace else "code"
    channels = ("commentary",) if namespace else ("analysis", "commentary")
    for channel in channels:
        yield f'" to={namespace}" {recipient} {_id(CHANNEL)} "{channel}" {kind}? {_id(MESSAGE)}'
        yield f'{_id(CHANNEL)} "{channel} to={namespace}" {recipient} {kind}? {_id(MESSAGE)}'


def body_grammar(body: Body, *, coerce: bool = False) -> str:
    """The grammar of a body alone, by which faults are found and named."""
    return "\n".join(["start: body_0", *_body_rules(body, "body_0", coerce=coerce)]) + "\n"


def _body_rules(body: Body, name: str, *, coerce: bool) -> Iterator[str]:
    if body.syntax == "json":
        yield f"{name}: %json {_json(body, coerce=coerce)}"
    elif body.syntax == "regex":
        yield f"{name}: {_regex(body.text)}"
    else:
        yield f"{name}: %lark {{\n{body.text}\n}}"


def _regex(pattern: str) -> str:
    """A regular expression as Lark writes it: a line, in slashes."""
    return "/" + re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", pattern).replace("\n", r"\n").replace("\r", r"\r") + "/"


def _json(body: Body, *, coerce: bool) -> str:
    """The schema, with how llguidance is to take it."""
    schema = json.loads(body.text)
    options = {"whitespace_pattern": WHITESPACE, "coerce_one_of": coerce or body.lenient, "lenient": body.lenient}
    schema = {} if schema is True else schema
    return json.dumps({**schema, "x-guidance": options}) if isinstance(schema, dict) else json.dumps(schema)


def _id(token: int) -> str:
    return f"<[{token}]>"
