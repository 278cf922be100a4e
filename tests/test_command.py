"""What every command line does alike."""

import json

from absl import flags

from gptoss_jax import command


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
