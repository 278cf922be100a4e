"""Answers followed by hand: text in which control tokens are spelled out, through a compiled form, id by id."""

from gptoss_jax.engine.constraint import Hold
from gptoss_jax.grammar.compiled import CompiledForm, compile_form
from gptoss_jax.grammar.forms import AUTO, ToolChoice, answer_form
from gptoss_jax.harmony import tool_schemas
from gptoss_jax.harmony.settings import Settings
from tests.made_answers import WORDS, ids_of

THOUGHT = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"


def settings_of(tools: object = None, response_format: object = None, **fields) -> Settings:
    """Settings from what OpenAI's forms have under these names."""
    return Settings(
        tools=tool_schemas.tools(tools) if tools else (),
        response_format=tool_schemas.response_format(response_format) if response_format else None,
        **fields,
    )


def schema_format(schema: object, **fields) -> dict:
    """A response format of this schema."""
    return {"type": "json_schema", "json_schema": {"name": "r", "schema": schema, **fields}}


def held(settings: Settings, choice: ToolChoice = AUTO) -> CompiledForm:
    """What these settings hold an answer to."""
    form = answer_form(settings, choice)
    assert form is not None
    return compile_form(form, WORDS)


def is_masked(hold: Hold, token: int) -> bool:
    """Whether a mask says that an id may not follow."""
    return hold.mask is not None and not hold.mask[token // 32] >> (token % 32) & 1


def followed(form: CompiledForm, text: str) -> str:
    """As much of a text as the form allows, however it is cut into ids: where some are forced, others may say it too.

    Masks and what the grammar can follow are held against each other.
    """
    matcher, ids = form.start(), ids_of(text)
    hold = matcher.advance(())
    for count, token in enumerate(ids):
        masked, has_mask = is_masked(hold, token), hold.mask is not None
        is_free, hold = hold.stands_below > 0, matcher.advance((token,))
        assert masked == bool(hold.fault) or is_free or not has_mask
        if masked or hold.fault:
            return WORDS.decode(ids[:count])
    return text
