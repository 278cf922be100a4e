"""What every form asks in the end: a conversation or plain ids, with a request's own options over the defaults."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gptoss_jax.api import overrides
from gptoss_jax.api.asked import Asked, Options
from gptoss_jax.api.fields import naming
from gptoss_jax.grammar.compiled import held_form
from gptoss_jax.harmony import render
from gptoss_jax.harmony.conversation import Conversation

_OURS = {setting: name for name, setting in overrides.SETTING_OF.items() if name != setting}


def conversation(
    spoken: Conversation,
    fields: Mapping[str, Any],
    defaults: Options,
    *,
    vocab_path: str | None,
    field_of: Mapping[str, str] = {},
) -> Asked:
    """A conversation to go on from.

    Args:
        spoken: its messages, and what it sets itself.
        fields: what the request sets beside it, by the names of our own form; others than those are not looked at.
        defaults: what acts where neither says anything.
        vocab_path: as for `harmony.render`.
        field_of: our own names -> the client's, where they differ.

    Raises:
        GptossError: a value that cannot be, or settings that contradict the conversation.
    """
    remarks = list(spoken.remarks)
    with naming({**_OURS, **field_of}):
        given = overrides.settings(fields, remarks)
        settings = render.resolve(dataclasses.replace(defaults.settings, **given), given, spoken)
        if defaults.toolbox is not None:
            settings = defaults.toolbox.settings(settings, spoken.messages)
        acting = overrides.options(fields, dataclasses.replace(defaults, settings=settings))
        choice = overrides.tool_choice(fields)
        form = held_form(settings, choice, vocab_path=vocab_path)
    whole = render.with_opening(spoken.messages, settings)
    effort = render.effort_remark(whole)
    return Asked(
        token_ids=tuple(render.render(whole, None, vocab_path=vocab_path)),
        options=acting,
        acting={
            **overrides.settings_document(render.acting(settings, spoken.messages)),
            **overrides.options_document(acting),
            **overrides.choice_document(choice),
        },
        remarks=(*remarks, *([effort] if effort else [])),
        vocab_path=vocab_path,
        form=form,
        conversation=whole,
    )


def plain_ids(
    token_ids: Sequence[int],
    fields: Mapping[str, Any],
    defaults: Options,
    *,
    raw: bool,
    vocab_path: str | None,
    field_of: Mapping[str, str] = {},
) -> Asked:
    """Ids that are the whole prompt, so that no setting has a place in it; arguments as for `conversation`.

    Raises:
        GptossError: a value that cannot be.
    """
    with naming(field_of):
        acting = overrides.options(fields, defaults)
    return Asked(
        token_ids=tuple(token_ids),
        options=acting,
        acting={**overrides.settings_document({}), **overrides.options_document(acting)},
        raw=raw,
        vocab_path=vocab_path,
    )
