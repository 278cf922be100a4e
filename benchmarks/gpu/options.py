"""The flags of `benchmarks.gpu`: what is measured, at which sizes, for how long."""

import re
from pathlib import Path

from absl import flags

from gptoss_jax.errors import GptossError

CONFIGS = Path(__file__).parents[2] / "configs"
KINDS = ("smoke", "limits", "ops", "decode", "prefill", "profile", "transformers")
OF_MODELS = ("ops", "decode", "prefill", "profile")  # one section for each model

SECTIONS = {
    "What is run, and where results go": (
        "only",
        "models",
        "kernels",
        "minutes",
        "patience",
        "out",
        "programs",
        "section",
    ),
    "Whole models": ("batch", "contexts", "prefill", "chunk", "steps", "dispatches", "memory_gib"),
    "Ops and limits": ("op_tokens", "op_attention", "op_windows", "loop_ms", "limit_mib", "matrix_side"),
    "Smoke": ("smoke_sizes", "smoke_groups", "repeats", "at_once"),
}


def define_flags() -> None:
    """All of SECTIONS."""
    flags.DEFINE_list("only", list(KINDS), f"NAMES: Of {', '.join(KINDS)}.")
    flags.DEFINE_list("models", ["gpt-oss-20b", "gpt-oss-120b"], "NAMES: Of configs/, or config.json files.")
    flags.DEFINE_string("kernels", "auto", "NAMES: As for generate.")
    flags.DEFINE_float("minutes", 8.5, "X: After which no section goes on.")
    flags.DEFINE_float("patience", 1.0, "X: Times the time limits of sections, for a machine that is slow or busy.")
    flags.DEFINE_string("out", None, "FILE: To which each figure is appended, a line of JSON, once it is measured.")
    flags.DEFINE_string(
        "programs", None, "FOLDER: Where compiled programs are kept from run to run; left out: nowhere."
    )
    flags.DEFINE_string(
        "section", None, "NAME: Run this one here, without a time limit: ops/gpt-oss-20b, for a profiler."
    )

    flags.DEFINE_list("batch", ["1", "8", "64", "256"], "NUMBERS: Slots that decode together.")
    flags.DEFINE_list("contexts", ["1024", "8192", "65536", "131072"], "NUMBERS: Tokens in the cache of each slot.")
    flags.DEFINE_list("prefill", ["512", "2048", "16384"], "NUMBERS: Tokens of a prompt.")
    flags.DEFINE_integer("chunk", 2048, "N: Tokens of a prompt that go in at once.", lower_bound=1)
    flags.DEFINE_integer("steps", 32, "N: Tokens drawn in one dispatch.", lower_bound=1)
    flags.DEFINE_integer("dispatches", 7, "N: Of which a time is the median.", lower_bound=1)
    flags.DEFINE_float("memory_gib", None, "X: Of the device to use; left out: what JAX may take.")

    flags.DEFINE_list("op_tokens", ["1", "8", "64", "256", "2048", "8192"], "NUMBERS: Tokens of expert_mlp.")
    sizes = ["1x1x8192", "1x1x130000", "8x1x8192", "64x1x8192", "1x2048x30720"]
    flags.DEFINE_list("op_attention", sizes, "SIZES: Over pages: sequences x tokens x tokens before them.")
    windows = ["1x1x8192", "64x1x8192"]
    flags.DEFINE_list("op_windows", windows, "SIZES: Over a sliding window: the same.")
    flags.DEFINE_float("loop_ms", 4.0, "X: How long a timed loop should take at the roofline.")
    flags.DEFINE_integer("limit_mib", 4096, "N: Size of the array that is copied and read.", lower_bound=1)
    flags.DEFINE_integer("matrix_side", 8192, "N: Of the matrices that are multiplied.", lower_bound=1)

    flags.DEFINE_enum("smoke_sizes", "true", ["true", "toy"], "The real shapes, or those for an interpreter on a CPU.")
    flags.DEFINE_list("smoke_groups", [], "NAMES: Of its groups; left out: all.")
    flags.DEFINE_integer("repeats", 20, "N: Calls whose results must be the same bits.", lower_bound=1)
    flags.DEFINE_integer("at_once", 6, "N: Groups of smoke that run beside one another.", lower_bound=1)


def check(options: flags.FlagValues) -> None:
    """Raises GptossError for names and sizes that are none."""
    if options.out and not Path(options.out).absolute().parent.is_dir():
        raise GptossError(f"--out {options.out}: no such folder")
    if unknown := [name for name in options.only if name not in KINDS]:
        raise GptossError(f"--only {', '.join(unknown)}, expected some of {', '.join(KINDS)}")
    for name in options.models:
        if not config_path(name).is_file():
            raise GptossError(f"--models {name}: no such config, expected a name of configs/ or a config.json")
    for name in ("batch", "contexts", "prefill", "op_tokens"):
        if wrong := [value for value in options[name].value or [] if not re.fullmatch(r"[1-9]\d{0,8}", value)]:
            raise GptossError(f"--{name.replace('_', '-')} {wrong[0]}, expected numbers from 1 on")
    for name in ("op_attention", "op_windows"):
        if wrong := [value for value in options[name].value or [] if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x\d+", value)]:
            raise GptossError(
                f"--{name.replace('_', '-')} {wrong[0]}, expected SEQUENCESxTOKENSxTOKENS, as in 8x1x8192"
            )
    if wrong := [tokens for tokens in numbers(options.prefill) if tokens > options.chunk and tokens % options.chunk]:
        raise GptossError(f"--prefill {wrong[0]} is no multiple of --chunk {options.chunk}")


def config_path(model: str) -> Path:
    """The config.json that a name of --models stands for."""
    return Path(model) if model.endswith(".json") else CONFIGS / f"{model}.json"


def numbers(values: list[str]) -> list[int]:
    """The values of a flag."""
    return [int(value) for value in values]


def sizes(values: list[str]) -> list[tuple[int, int, int]]:
    """The values of a flag of sizes."""
    return [(int(a), int(b), int(c)) for a, b, c in (value.split("x") for value in values)]
