"""Options of fine-tuning: ranges, what excludes each other, and the record of a run."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptoss_jax.training import options
from gptoss_jax.training.options import LoraOptions, OptimizerOptions, OptionError, TrainOptions

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {"batch_rows": 6, "row_tokens": 48, "steps": 3}


@pytest.mark.parametrize(
    "chosen",
    [
        TrainOptions(**SMALL),
        TrainOptions(
            batch_rows=6,
            row_tokens=48,
            epochs=0.5,
            lora=LoraOptions(rank=3, targets=("router", "attention")),
            accumulate=3,
            channels=("final",),
        ),
        TrainOptions(
            **SMALL, method="full", quantize_from=0.5, optimizer=OptimizerOptions("muon", matrix_learning_rate=0.1)
        ),
    ],
)
def test_the_record_of_a_run_gives_its_options(chosen):
    """Guards a resumed run against options other than those it began with."""
    assert options.from_dict(json.loads(json.dumps(options.to_dict(chosen)))) == chosen


def test_defaults_that_depend_on_others():
    """Guards the adapters and Muon's rate against None where they are used, and against order in lists of words."""
    chosen = TrainOptions(**SMALL, channels=("final", "analysis"))
    assert chosen.lora == LoraOptions()
    assert chosen.channels == ("analysis", "final")
    assert TrainOptions(**SMALL, method="full").lora is None
    assert OptimizerOptions(name="muon").matrix_learning_rate == options.MUON_MATRIX_RATE
    assert OptimizerOptions().matrix_learning_rate is None


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"batch_rows": 0}, "batch_rows is 0, expected a whole number from 1 to 2147483647"),
        ({"batch_rows": True}, "batch_rows is True, expected a whole number from 1 to 2147483647"),
        ({"row_tokens": 1}, "row_tokens is 1, expected a whole number from 2 to 2147483647"),
        ({"accumulate": 4}, "batch_rows is 6, expected a multiple of accumulate, 4"),
        ({"steps": None}, "got neither of steps and epochs, expected exactly one of them"),
        ({"epochs": 1.0}, "got both of steps and epochs, expected exactly one of them"),
        ({"steps": None, "epochs": 0.0}, "epochs is 0.0, expected a number above 0"),
        ({"seed": -1}, "seed is -1, expected a whole number from 0 to 4294967295"),
        ({"method": "qlora"}, "method is 'qlora', expected one of lora, full"),
        (
            {"method": "full", "lora": LoraOptions()},
            "lora is given, but method is full, which has no adapters: leave one of them out",
        ),
        ({"quantize_from": 0.5}, "quantize_from needs method full, got lora, whose experts stay as they are"),
        (
            {"method": "full", "quantize_from": 2.0},
            "quantize_from is 2.0, expected a number of at least 0 and of at most 1",
        ),
        ({"balance_loss": float("nan")}, "balance_loss is nan, expected a number of at least 0"),
        ({"dtype": "auto"}, "dtype is 'auto', expected one of float32, bfloat16"),
        ({"channels": ()}, "channels is empty, expected at least one of analysis, commentary, final"),
        ({"channels": ("user",)}, "channels holds 'user', expected some of analysis, commentary, final"),
    ],
)
def test_refused_runs(changed, text):
    """Guards the hours of a run against an option that only its end would show to be wrong."""
    with pytest.raises(OptionError) as error:
        TrainOptions(**(SMALL | changed))
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("kind", "changed", "text"),
    [
        (LoraOptions, {"rank": 0}, "rank is 0, expected a whole number from 1 to 2147483647"),
        (LoraOptions, {"alpha": 0.0}, "alpha is 0.0, expected a number above 0"),
        (LoraOptions, {"dropout": 1.0}, "dropout is 1.0, expected a number of at least 0 and below 1"),
        (
            LoraOptions,
            {"targets": ("mlp",)},
            "targets holds 'mlp', expected some of attention, router, experts, unembedding",
        ),
        (OptimizerOptions, {"name": "sgd"}, "optimizer is 'sgd', expected one of adamw, muon"),
        (
            OptimizerOptions,
            {"matrix_learning_rate": 0.1},
            "matrix_learning_rate is muon's, got optimizer adamw: leave one of them out",
        ),
        (OptimizerOptions, {"warmup": 1.5}, "warmup is 1.5, expected a number of at least 0 and of at most 1"),
        (OptimizerOptions, {"clip": -1.0}, "clip is -1.0, expected a number of at least 0"),
    ],
)
def test_refused_parts(kind, changed, text):
    """Guards adapters and optimizer as `test_refused_runs` does the run."""
    with pytest.raises(OptionError) as error:
        kind(**changed)
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"step": 1}, "options: got the unknown key 'step', expected some of batch_rows, row_tokens, steps"),
        ({"lora": {"ranks": 1}}, "lora: got the unknown key 'ranks', expected some of rank, alpha, dropout, targets"),
        ({"steps": 0}, "steps is 0, expected a whole number"),
    ],
)
def test_refused_records(changed, text):
    """Guards a run against a record that another version wrote."""
    with pytest.raises(OptionError, match=text):
        options.from_dict(options.to_dict(TrainOptions(**SMALL)) | changed)


def test_values_of_another_type_are_refused():
    """Guards JSON's 1.5 for a whole number: in a process of its own, since this one's type checks come first."""
    code = """
from gptoss_jax.training import options
for changed in ({"steps": 1.5}, {"rematerialize": 1}, {"channels": "final"}, {"optimizer": {"clip": "1"}}, {"lora": 3}):
    try:
        options.from_dict({"batch_rows": 6, "row_tokens": 48, "steps": 3, **changed})
    except options.OptionError as error:
        print(error)
import sys
print("jax" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines() == [
        "steps is 1.5, expected a whole number from 1 to 2147483647",
        "rematerialize is 1, expected True or False",
        "channels is 'final', expected a list of some of analysis, commentary, final",
        "clip is '1', expected a number of at least 0",
        "lora: got 3, expected an object with some of rank, alpha, dropout, targets",
        "False",
    ]


def test_a_record_without_rows_is_refused():
    """Guards the one-line error where TypeError would be Python's own."""
    record = options.to_dict(TrainOptions(**SMALL))
    del record["row_tokens"]
    with pytest.raises(OptionError, match="options have no row_tokens, which is needed"):
        options.from_dict(record)


def test_options_do_not_change():
    """Guards the record of a run: options that change under it would say something else."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainOptions(**SMALL).steps = 4  # pyright: ignore[reportAttributeAccessIssue]
