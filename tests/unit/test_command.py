"""What every command line does alike."""

import gc
import json
import os
import signal
import time

import pytest
from absl import flags

from gptoss_jax.cli import command


def test_json_keeps_numbers_together_and_changes_nothing():
    """Guards the regular expression that joins lists: strings that look like lists stay as they are."""
    document = {
        "ids": [1, 2, 3],
        "logprobs": [-0.5, -1e-07, 12.25],
        "pairs": [[1, -0.5], [2, -3.0]],
        "empty": [],
        "mixed": [None, 1],
        "text": ["[\n 1,\n 2\n]", "[ 1, 2 ]", "é"],
    }
    text = command.to_json(document)
    assert json.loads(text) == document
    lines = [line.strip() for line in text.splitlines()]
    assert '"ids": [1, 2, 3],' in lines
    assert '"logprobs": [-0.5, -1e-07, 12.25],' in lines
    assert "[1, -0.5]," in lines
    assert '"é"' in lines


def test_help_names_values_meanings_and_defaults():
    """Guards what absl writes into help texts, and defaults that are 0."""
    values = flags.FlagValues()
    flags.DEFINE_string("save", None, "FILE: Where to.", flag_values=values)
    flags.DEFINE_enum("effort", "low", ["low", "high"], "How hard: very.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "the seed: any", flag_values=values)
    flags.DEFINE_multi_string("stop", [], "TEXT: Where.", flag_values=values)
    flags.DEFINE_bool("two_words", False, "Both: yes.", flag_values=values)
    text = command.help_text(values, {"First": ["save", "effort"], "Second": ["seed", "stop", "two_words"]})
    assert text.splitlines() == [
        "First:",
        *("  --save FILE", "      Where to."),
        *("  --effort low|high", "      How hard: very. [low]"),
        *("", "Second:"),
        *("  --seed INT", "      the seed: any [0]"),
        *("  --stop TEXT", "      Where."),
        *("  --[no]two-words", "      Both: yes."),
    ]


@pytest.mark.parametrize("collects", [False, True])
def test_ctrl_c_is_not_lost_in_a_callback_of_the_garbage_collector(collects):
    """Guards every command: JAX has such a callback, and Python drops what is raised in one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    reached = []

    def callback(phase: str, info: dict[str, int]) -> None:
        if phase == "stop" and not reached:
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("the callback's end")

    def main(arguments: list[str]) -> None:
        if collects:
            gc.callbacks.append(callback)
            gc.collect()
        else:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        reached.append("the command's end")

    try:
        with pytest.raises(SystemExit) as ended:
            command._guard(main, [], "test")
    finally:
        gc.callbacks[:] = [other for other in gc.callbacks if other is not callback]
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == command.INTERRUPTED
    assert reached == (["the callback's end"] if collects else [])


def test_jobs_in_a_scripts_background_still_ignore_ctrl_c():
    """Guards `convert ... &` in a script, which the shell starts with the signal ignored."""
    before, reached = signal.signal(signal.SIGINT, signal.SIG_IGN), []
    try:
        command._guard(lambda _: reached.append(os.kill(os.getpid(), signal.SIGINT)), [], "test")
    finally:
        signal.signal(signal.SIGINT, before)
    assert reached == [None]
