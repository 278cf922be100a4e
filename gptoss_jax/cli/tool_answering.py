"""Answers one prompt of `generate` in rounds: what the model calls is run here, until it answers."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from absl import flags

from gptoss_jax.cli.answer_view import AnswerView, form_remarks
from gptoss_jax.cli.prompts import Prompt
from gptoss_jax.cli.terminal import Screen
from gptoss_jax.cli.tool_view import ToolView
from gptoss_jax.engine.request import Request
from gptoss_jax.grammar.compiled import held_form
from gptoss_jax.harmony import render
from gptoss_jax.harmony.settings import Settings
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.runtime.answers import Sample
from gptoss_jax.runtime.tool_answers import ToolRun
from gptoss_jax.tools.rounds import Rounds
from gptoss_jax.tools.toolbox import Toolbox, declared

if TYPE_CHECKING:
    import gptoss_jax.engine.engine


def collected(
    options: flags.FlagValues,
    screen: Screen,
    prompt: Prompt,
    request: Request,
    engine: "gptoss_jax.engine.engine.Engine",
    toolbox: Toolbox,
    stopped: Callable[[], bool],
) -> tuple[list[Sample], Rounds]:
    """The answers of all rounds, shown as they come, and the rounds.

    A choice of tools that --tool-choice makes holds the first answer alone: one that has to call would never end.
    """
    spoken = prompt.conversation or []
    view = ToolView(
        screen,
        lambda: AnswerView(screen, show_reasoning=options.show_reasoning),
        shows_answers=not options.json,
        shows_calls=not options.quiet,
        to_see_reasoning="" if options.show_reasoning or options.json else "--show-reasoning",
    )
    turn = Rounds(
        spoken,
        toolbox,
        declared(spoken),
        most_rounds=options.tool_rounds,
        most_tokens=options.max_new_tokens,
    )
    later_form = held_form(Settings(**prompt.settings), vocab_path=options.vocab)
    run = ToolRun(
        engine,
        load_tokenizer(options.vocab),
        request,
        lambda messages: render.render(messages, None, vocab_path=options.vocab),
        toolbox,
        options.stop,
        later_form,
        view,
        stopped,
    )
    run.run(turn)
    for call in () if options.json else turn.waiting():
        screen.answer(json.dumps(call.document(), ensure_ascii=False) + "\n")
    view.ended(turn)
    for remark in form_remarks(prompt.form if len(turn.rounds) == 1 else later_form, turn.answer):
        screen.say(remark)
    return run.samples, turn
