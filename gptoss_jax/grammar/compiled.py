"""Forms compiled: what an engine's request carries to have its answer held, refused here where they cannot be."""

import dataclasses
import functools
import re
from typing import Any

from gptoss_jax.grammar import lark
from gptoss_jax.grammar.forms import AUTO, AnswerForm, Body, FormError, ToolChoice, answer_form
from gptoss_jax.grammar.matcher import MessageMatcher
from gptoss_jax.grammar.vocabulary import ll_tokenizer, llguidance
from gptoss_jax.harmony.settings import Settings
from gptoss_jax.harmony.tokenizer import CALL, RETURN, START, VOCAB_SIZE, Tokenizer, load_tokenizer

KEPT_FORMS = 256  # compiled ones, which requests of the same form share; each takes some 100 kB
_KEYWORDS = re.compile(r"Unimplemented keys: \[(.*?)\]")


@dataclasses.dataclass(frozen=True)
class CompiledForm:
    """A form that an engine can hold an answer to: `Request.constraint`.

    Attributes:
        form: what is held.
        remarks: what of it is not enforced to the letter, a line each.
        to_check: the bodies that these speak of: a finished answer has to be looked at.
        num_ids: of the vocabulary.
        end_ids: with these an answer ends.
    """

    form: AnswerForm
    remarks: tuple[str, ...]
    to_check: frozenset[Body]
    _first: Any = dataclasses.field(repr=False, compare=False)  # after `<|start|>assistant`
    _next: Any = dataclasses.field(repr=False, compare=False)  # before it
    _tokenizer: Tokenizer = dataclasses.field(repr=False, compare=False)
    num_ids: int = VOCAB_SIZE
    end_ids: tuple[int, ...] = (RETURN, CALL)

    def start(self) -> MessageMatcher:
        """What follows one answer, from after `<|start|>assistant` on."""
        return MessageMatcher(self._first, self._next, self._tokenizer)


@functools.lru_cache(maxsize=KEPT_FORMS)
def compile_form(form: AnswerForm, tokenizer: Tokenizer) -> CompiledForm:
    """A form, compiled; some milliseconds for most, without Python's lock, and nothing when it comes again.

    Raises:
        FormError: what cannot be enforced, or no text fulfils; the error names the schema and the keyword.
        NotInstalledError: as `vocabulary.llguidance`.
    """
    bodies = _bodies(form)
    whole, found = _matcher(lark.message_grammar(form), tokenizer), []
    if whole.is_error() or any(body.lenient for body in bodies):  # whose fault it is, and what is not enforced
        found = [(body, *_taken(body, tokenizer)) for body in bodies]
    coerced = frozenset(body for body, is_coerced, _ in found if is_coerced)
    if coerced:
        whole = _matcher(lark.message_grammar(form, coerced=coerced), tokenizer)
    if fault := whole.get_error():
        raise FormError(f"the form of the answer cannot be held: {_first_line(fault)}")
    first = whole.deep_copy()
    if not first.consume_tokens([START, *tokenizer.encode("assistant")]):
        raise FormError(f"the form of the answer cannot be held: {_first_line(first.get_error())}")
    first.compute_bitmask()  # here rather than with the first answer: the lexer's tables are made
    remarks = tuple(f"{body.where}: {remark}" for body, _, remarks in found for remark in remarks)
    to_check = frozenset(body for body, _, some in found if some)
    return CompiledForm(form, remarks, to_check, first, whole, tokenizer)


def held_form(settings: Settings, choice: ToolChoice = AUTO, *, vocab_path: str | None = None) -> CompiledForm | None:
    """What settings and a choice of tools hold an answer to, compiled; None: nothing.

    Raises:
        GptossError: as `forms.answer_form` and `compile_form`.
    """
    form = answer_form(settings, choice)
    return None if form is None else compile_form(form, load_tokenizer(vocab_path))


def _bodies(form: AnswerForm) -> list[Body]:
    final = [form.final] if isinstance(form.final, Body) else []
    return list(dict.fromkeys((*final, *(body for _, body in form.calls))))


def _taken(body: Body, tokenizer: Tokenizer) -> tuple[bool, list[str]]:
    """Whether `oneOf` in a body had to be coerced, and what of it is not enforced to the letter."""
    matcher = _matcher(lark.body_grammar(body), tokenizer)
    fault = matcher.get_error()
    coerces = body.syntax == "json" and '"oneOf"' in body.text and (bool(fault) or body.lenient)
    if coerces:
        matcher = _matcher(lark.body_grammar(body, coerce=True), tokenizer)
        fault = matcher.get_error()
    if fault:
        raise FormError(_refusal(body, fault))
    remarks = ["oneOf is held as anyOf, and the finished answer is checked"] if coerces else []
    warnings = [_warning(warning) for warning in matcher.get_grammar_warnings() if not warning.startswith("oneOf")]
    return coerces, [*remarks, *warnings]


def _matcher(grammar: str, tokenizer: Tokenizer) -> Any:
    return llguidance().LLMatcher(ll_tokenizer(tokenizer), grammar, log_level=0)


def _first_line(fault: str) -> str:
    """What llguidance complains of, without the place and the grammar."""
    fault = re.sub(r"^(at )?\d+\(\d+\): ", "", fault).split("\n   1 |")[0]
    fault = fault.removeprefix("failed to compile JSON schema: ").removeprefix('failed to parse "%json": ')
    return _short_line(fault)


def _short_line(text: str, most: int = 200) -> str:
    """The text on one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}..."


def _refusal(body: Body, fault: str) -> str:
    found = _KEYWORDS.search(fault)
    if found:
        return (
            f"{body.where} has {found[1]}, which cannot be enforced: take it out, or set strict to false, "
            "which passes it over"
        )
    return f"{body.where} cannot be held: {_first_line(fault)}"


def _warning(warning: str) -> str:
    found = _KEYWORDS.search(warning)
    return f"{found[1]} is not enforced" if found else _short_line(warning)
