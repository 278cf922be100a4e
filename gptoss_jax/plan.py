r"""What a mesh would hold, move and compute, on chips that need not be here.

    python -m gptoss_jax.plan gpt-oss-20b --on h200x1
    python -m gptoss_jax.plan gpt-oss-120b --on h200x8 --mesh expert=8 --batch 64
    python -m gptoss_jax.plan gpt-oss-120b --on v6e:2x4 --context 131072 \
        --mesh configs/meshes/v6e-8.json
    python -m gptoss_jax.plan gpt-oss-120b --on h200x8 --batch 64 \
        --compare expert=8 data=2,expert=4
    python -m gptoss_jax.plan gpt-oss-120b --on tpu7x:2x2x1 --sweep \
        --batch 1,8,64,512 --csv sweep.csv --plot sweep.png

What was compiled, of shapes alone; no weights are read and no device is needed:

    python -m gptoss_jax.plan gpt-oss-20b --on cpu:8 --mesh expert=4,tensor=2 \
        --batch 8 --show collectives,memory
    python -m gptoss_jax.plan gpt-oss-20b --on h200x8 --mesh expert=8 \
        --batch 64 --layers 2 --show timeline
    python -m gptoss_jax.plan gpt-oss-120b --on v6e:2x4 --mesh expert=8 \
        --batch 8 --nofast

MODEL is gpt-oss-20b or gpt-oss-120b, a config.json, or a folder that holds one.
A slice (--on) is h100xN, h200xN, b200xN, v5e:AxB, v6e:AxB, v5p:AxBxC,
tpu7x:AxBxC, or cpu:N: devices that JAX simulates, of which no speed is said.

Prints, of each device: bytes by part against its memory; operations, bytes and
collectives of a decoding step and of a chunk of prompts; and what the published
rates of the chip allow at most. By default all figures are of a closed form of
the model's numbers, and neither JAX nor a compiler runs. --nofast, --show and
--dump compile: by the compiler for the slice where its wheels are here (make
gates installs them into .venv/compilers, which goes on PYTHONPATH), else by XLA
for as many simulated CPU devices; which of them is said.
Memory is within 5 % of the compilers' own count where docs/lab_notes.md has it
compiled; python -m benchmarks.ahead_of_time presets compiles every preset.
What does not fit is refused, and meshes of the slice are named that would do.
Exit codes: 0 planned, 2 bad input or does not fit, 141 stdout's reader left.
"""

from absl import flags

from gptoss_jax.cli import command, flag_values

SECTIONS = {
    "What runs where": ("on", "mesh", "batch", "context", "prefill"),
    "Several meshes": ("sweep", "compare", "csv", "plot", "rows"),
    "Costs that no data sheet has": ("launch_us", "collective_us"),
    "What a compiler makes of it": ("fast", "show", "step", "layers", "dump"),
    "What is shown": ("json",),
}


def define_flags() -> None:
    """This command's flags."""
    flags.DEFINE_string("on", None, "SLICE: The chips, for example h200x8 or v6e:2x4.")
    flags.DEFINE_string("mesh", "", 'AXES: Devices: "data=1,expert=4,tensor=2" or a .json file; empty: one device.')
    flags.DEFINE_list("batch", ["1"], "N: Sequences at once, over all devices; of --sweep several, as in 1,8,64.")
    flags.DEFINE_list("context", ["8192"], "N: Tokens of each sequence; of --sweep several.")
    flags.DEFINE_integer("prefill", 128, "N: Tokens of each prompt that are read at once.")
    flags.DEFINE_bool("sweep", False, "Plan every mesh of the slice, and rank those that fit.")
    flags.DEFINE_string(
        "compare", None, "MESHES: Two side by side, as in --compare A B; or one, beside that of --mesh."
    )
    flags.DEFINE_string("csv", None, "FILE: Of --sweep, every mesh that fits, a line each.")
    flags.DEFINE_string("plot", None, "FILE: Of --sweep, a .png or .svg (pip install matplotlib).")
    flags.DEFINE_integer("rows", 20, "N: Of --sweep, lines of the table on the terminal.")
    flags.DEFINE_float("launch_us", 0.0, "X: Microseconds that each launch costs, where they are counted.")
    flags.DEFINE_float("collective_us", 0.0, "X: Microseconds that each collective costs beside its bytes.")
    flags.DEFINE_bool(
        "fast",
        True,
        "A closed form of the model's numbers, below 2 s and without JAX: the default. With --nofast both programs are "
        "compiled too, by the vendor's compiler or XLA's for CPUs, and it is said where the two differ.",
    )
    flags.DEFINE_list(
        "show",
        [],
        "PARTS: Of one compiled program, comma-separated: collectives, sharding, memory, flops, timeline, hlo.",
    )
    flags.DEFINE_enum("step", "decode", ["decode", "prefill"], "Of --show and --dump, which program.")
    flags.DEFINE_integer("layers", None, "N: Compile the first N layers only; left out: all.")
    flags.DEFINE_string("dump", None, "FOLDER: Where to write StableHLO, compiled text and protos.")
    flags.DEFINE_bool("json", False, "Print one JSON document, in bytes and seconds.")


def main(arguments: list[str]) -> None:
    """See the module's docstring."""
    from gptoss_jax.cli import planning  # here, so that --help need not wait for what it imports

    options = flags.FLAGS
    flag_values.refuse_together(options, ("sweep", "mesh"), ("sweep", "compare"))
    flag_values.refuse_without(options, ("csv", "sweep"), ("plot", "sweep"))
    planning.plan(options, arguments)


def cli() -> None:
    """The console script."""
    define_flags()
    command.run(main, "plan", SECTIONS)


if __name__ == "__main__":
    cli()
