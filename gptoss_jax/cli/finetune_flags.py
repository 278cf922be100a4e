"""The flags of fine-tuning, and what they ask for, checked without JAX."""

import re
from typing import Any

from absl import flags

from gptoss_jax.cli.flag_values import naming_flags, refuse_together
from gptoss_jax.cli.mistakes import spelled
from gptoss_jax.errors import GptossError
from gptoss_jax.training.options import (
    CHANNELS,
    DTYPES,
    LORA_TARGETS,
    METHODS,
    OPTIMIZERS,
    LoraOptions,
    OptimizerOptions,
    TrainOptions,
)

AUTO = "auto"
_LORA = {"lora_rank": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "lora_targets": "targets"}
_EVERY = ("log_every", "evaluate_every", "save_every")
SECTIONS = {
    "The run": ("checkpoint", "data", "validation", "output", "steps", "epochs", "seed", "dry_run", "quiet"),
    "What is trained": ("method", *_LORA, "channels", "quantize_from", "balance_loss", "compact_vocabulary"),
    "How weights change": (
        "optimizer",
        "learning_rate",
        "matrix_learning_rate",
        "weight_decay",
        "warmup",
        "decay_from",
        "clip",
    ),
    "Batches": ("batch_rows", "row_tokens", "accumulate"),
    "What is reported and kept": _EVERY,
    "Machine": ("mesh", "dtype", "kernels", "rematerialize"),
}


def define_flags() -> None:
    """The flags named in SECTIONS."""
    _define_run()
    _define_training()
    _define_optimizer()
    flags.DEFINE_integer("batch_rows", 8, "N: Rows of a step, over all devices and all accumulated parts.")
    flags.DEFINE_integer("row_tokens", 2048, "N: Tokens of a row, into which conversations are packed.")
    flags.DEFINE_integer("accumulate", 1, "N: Parts of a step's rows, gone through one after the other.")
    flags.DEFINE_integer("log_every", 1, "STEPS: How often a row of metrics is written; 0: after the last step.")
    flags.DEFINE_integer("evaluate_every", 0, "STEPS: How often validation is measured; 0: after the last step.")
    flags.DEFINE_integer("save_every", 100, "STEPS: How often the state is saved; 0: after the last step.")
    flags.DEFINE_string("mesh", "", 'AXES: Devices: "data=1,expert=4,tensor=2" or a .json file; empty: one device.')
    flags.DEFINE_enum("dtype", AUTO, [AUTO, *DTYPES], "Number format of activations; auto: float32 on CPUs.")
    flags.DEFINE_string("kernels", AUTO, "NAMES: auto, or by name, as in attention=reference.")
    flags.DEFINE_bool("rematerialize", False, "Compute layers again in the backward pass: slower, in less memory.")


def _define_run() -> None:
    flags.DEFINE_string("checkpoint", None, "FOLDER: What to start from: a checkpoint, or published safetensors.")
    flags.DEFINE_list("data", [], "FILES: Conversations, JSONL; several with commas between them.")
    flags.DEFINE_list(
        "validation", [], "FILES: Others, to measure with; or the share of --data to keep for that: 0.05."
    )
    flags.DEFINE_string("output", None, "FOLDER: Of this run: metrics, states, and its result.")
    flags.DEFINE_integer("steps", None, "N: Length of the run; or --epochs, which is 1 where neither is given.")
    flags.DEFINE_float("epochs", None, "X: How often the run goes through the conversations.")
    flags.DEFINE_integer("seed", 0, "N: Of adapters, order and dropout.")
    flags.DEFINE_bool("dry_run", False, "Only say what memory the run takes, and how many tokens it has.")
    flags.DEFINE_bool("quiet", False, "Print no notes and no progress on stderr: only what is wrong.")


def _define_training() -> None:
    lora, full = LoraOptions(), TrainOptions(1, 2, 1)
    flags.DEFINE_enum("method", full.method, METHODS, "Train adapters beside the weights, or all weights.")
    flags.DEFINE_integer("lora_rank", lora.rank, "N: Rank of the adapters.")
    flags.DEFINE_float("lora_alpha", lora.alpha, "X: What an adapter adds is scaled by X / rank.")
    flags.DEFINE_float("lora_dropout", lora.dropout, "SHARE: Of an adapter's inputs, set to zero at each step.")
    flags.DEFINE_list("lora_targets", list(lora.targets), f"NAMES: What gets adapters, of {','.join(LORA_TARGETS)}.")
    flags.DEFINE_list("channels", list(CHANNELS), "NAMES: The channels of the assistant that are learned.")
    flags.DEFINE_float("quantize_from", None, "SHARE: Of the run, after which experts are rounded to MXFP4; full only.")
    flags.DEFINE_float("balance_loss", full.balance_loss, "X: Weight of the loss that spreads tokens over experts.")
    flags.DEFINE_bool("compact_vocabulary", False, "Keep only rows of embeddings that are used or differ; full only.")


def _define_optimizer() -> None:
    given = OptimizerOptions()
    flags.DEFINE_enum("optimizer", given.name, OPTIMIZERS, "AdamW for all, or Muon for matrices.")
    flags.DEFINE_float("learning_rate", given.learning_rate, "X: AdamW's, at its highest.")
    flags.DEFINE_float("matrix_learning_rate", None, "X: Muon's, at its highest; left out: 0.03.")
    flags.DEFINE_float("weight_decay", given.weight_decay, "X: Times the rate: share of a weight taken away a step.")
    flags.DEFINE_float("warmup", given.warmup, "SHARE: Of the run in which the rate rises from 0.")
    flags.DEFINE_float("decay_from", given.decay_from, "SHARE: Of the run after which the rate falls to 0.")
    flags.DEFINE_float("clip", given.clip, "X: Gradients are scaled down to this global norm; 0: not at all.")


def train_options(options: flags.FlagValues) -> TrainOptions:
    """What the flags ask for. Where --dtype is auto, that of a CPU stands there.

    Raises:
        GptossError: values out of their range, or flags that exclude each other.
    """
    refuse_together(options, ("steps", "epochs"))
    is_lora = options.method == "lora"
    if not is_lora and (given := [name for name in _LORA if options[name].present]):
        raise GptossError(f"{spelled(given[0])} has an effect with --method lora only: leave it out")
    if is_lora and options.compact_vocabulary:
        raise GptossError("--compact-vocabulary has an effect with --method full only: leave it out")
    for name in _EVERY:
        value: Any = options[name].value
        if value < 0:
            raise GptossError(f"{spelled(name)} is {value}, expected at least 0")
    with naming_flags({field: flag for flag, field in _LORA.items()} if is_lora else {}):
        lora = LoraOptions(**{field: _value(options, flag) for flag, field in _LORA.items()}) if is_lora else None
    with naming_flags({"channels": "channels"}):
        return _train_options(options, lora)


def _train_options(options: flags.FlagValues, lora: LoraOptions | None) -> TrainOptions:
    return TrainOptions(
        batch_rows=options.batch_rows,
        row_tokens=options.row_tokens,
        steps=options.steps,
        epochs=1.0 if options.steps is None and options.epochs is None else options.epochs,
        method=options.method,
        lora=lora,
        optimizer=OptimizerOptions(
            options.optimizer,
            **{name: _value(options, name) for name in SECTIONS["How weights change"] if name != "optimizer"},
        ),
        accumulate=options.accumulate,
        seed=options.seed,
        quantize_from=options.quantize_from,
        balance_loss=options.balance_loss,
        rematerialize=options.rematerialize,
        compact_vocabulary=options.compact_vocabulary,
        dtype=DTYPES[0] if options.dtype == AUTO else options.dtype,
        channels=tuple(options.channels),
    )


def _value(options: flags.FlagValues, name: str) -> Any:
    value = options[name].value
    return tuple(value) if isinstance(value, list) else value


def validation(options: flags.FlagValues) -> tuple[list[str], float]:
    """Files of validation data, or the share of --data that is kept for it: one of them is empty or 0.

    Raises:
        GptossError: a share out of its range.
    """
    names = list(options.validation)
    if len(names) != 1 or not re.fullmatch(r"\d+|\d*\.\d+", names[0]):
        return names, 0.0
    if not 0 < float(names[0]) < 1:
        raise GptossError(f"--validation is {names[0]}, expected files, or a share above 0 and below 1")
    return [], float(names[0])
