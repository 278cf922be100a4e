"""The flags that every command which runs a model shares: which weights, and on what they run."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from gptoss_jax.checkpoints import opening
from gptoss_jax.cli import hosts, interrupts
from gptoss_jax.engine.request import EngineConfig
from gptoss_jax.errors import GptossError
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.runtime import demo_model, device_memory
from gptoss_jax.runtime.number_formats import ACTIVATIONS, DENSE_ITEMSIZE

if TYPE_CHECKING:
    import gptoss_jax.cli.terminal
    import gptoss_jax.engine.engine
    import gptoss_jax.runtime.language_model

MODEL_FLAGS = (
    "checkpoint",
    "adapter",
    "mesh",
    "dtype",
    "dense",
    "kernels",
    "compilation_cache",
    "vocab",
    *hosts.HOST_FLAGS,
)


def define_flags() -> None:
    """The flags named in MODEL_FLAGS; all but vocab are read here."""
    flags.DEFINE_string(
        "checkpoint",
        None,
        "FOLDER: A converted checkpoint, or a folder of published safetensors; generate and score have a demo model.",
    )
    flags.DEFINE_string("adapter", None, "FOLDER: A PEFT adapter (LoRA) beside the weights, as fine-tuning makes one.")
    flags.DEFINE_string("mesh", "", 'AXES: Devices: "data=1,expert=4,tensor=2" or a .json file; empty: one device.')
    flags.DEFINE_enum("dtype", "bfloat16", ACTIVATIONS, "Number format of the activations.")
    flags.DEFINE_enum(
        "dense", "bfloat16", list(DENSE_ITEMSIZE), "Weights of attention and unembedding; int8 is rounded."
    )
    flags.DEFINE_string("kernels", "auto", "NAMES: auto, or by name: attention=reference,expert_mlp=reference.")
    flags.DEFINE_string(
        "compilation_cache",
        None,
        "FOLDER: Where compiled programs are kept; left out: in the user's cache folder; empty: nowhere.",
    )
    flags.DEFINE_string("vocab", None, "FILE: A vocabulary in place of the packaged o200k_base.tiktoken.")
    hosts.define_flags()


def config(options: flags.FlagValues) -> ModelConfig:
    """The architecture of --checkpoint, without its weights: what a request can be checked against at once.

    Raises:
        GptossError: --checkpoint is missing, unfinished, or no gpt-oss model; flags of several hosts that do not fit
            together.
    """
    hosts.check(options)
    if not options.checkpoint:
        raise GptossError("--checkpoint is missing, expected a converted checkpoint or a folder of safetensors")
    return opening.open_weights(Path(options.checkpoint)).config


def default_to_demo_model(options: flags.FlagValues, screen: "gptoss_jax.cli.terminal.Screen") -> None:
    """Sets --checkpoint to the demo model of the package where it is left out, and says so.

    Raises:
        GptossError: --checkpoint is missing, and this installation has no demo model, or it cannot be unpacked.
    """
    if options.checkpoint is not None:  # an empty one is a script's mistake, and `config` says so
        return
    try:
        options.checkpoint = str(demo_model.folder())
    except demo_model.DemoModelError as error:
        raise GptossError(f"--checkpoint is missing, and {error}") from None
    screen.note("no --checkpoint, so this is the package's tiny demo model (docs/finetune.md says what it knows)")


def load(
    options: flags.FlagValues, screen: "gptoss_jax.cli.terminal.Screen", *, if_random: str
) -> "gptoss_jax.runtime.language_model.LanguageModel":
    """The model that the flags name, loaded under a progress bar, and what people should know of it on stderr.

    Raises:
        GptossError: as `loading.load` and `hosts.join`.
        KeyboardInterrupt: Ctrl-C.
    """
    hosts.join(options, screen)
    with interrupts.ended_by_ctrl_c():
        from gptoss_jax.runtime import loading  # here, so that a mistake is found before JAX is imported

    note_device_memory(screen)
    programs_folder = _programs_folder(options, screen)
    with interrupts.stopping(screen.say) as pressed, screen.progress("loading", pressed) as report:
        language_model = loading.load(
            options.checkpoint,
            mesh=options.mesh or None,
            dtype=options.dtype,
            dense=options.dense,
            adapter=options.adapter,
            kernels=options.kernels,
            programs_folder=programs_folder,
            report=report,
        )
    hosts.check_same("the model's config.json", language_model.config)
    screen.note(f"loaded {language_model.source} in {language_model.load_seconds:.1f} s")
    screen.note(language_model.kernels)
    if language_model.weights_are_random:
        screen.say(f"these weights are RANDOM: {if_random}")
    return language_model


def note_device_memory(screen: "gptoss_jax.cli.terminal.Screen") -> None:
    """Says what JAX may take of a GPU, where one is what it will run on."""
    with interrupts.ended_by_ctrl_c():
        if line := device_memory.described():
            screen.note(line)


def _programs_folder(options: flags.FlagValues, screen: "gptoss_jax.cli.terminal.Screen") -> Path | None:
    """The folder of --compilation-cache; None where nothing is to be kept, or cannot be, which is said."""
    from gptoss_jax.runtime import kept_programs

    if options.compilation_cache == "":
        return None
    try:
        folder = Path(options.compilation_cache or kept_programs.default_folder())
        reason = kept_programs.why_not(folder)
    except RuntimeError as error:  # a user without a home
        folder, reason = None, str(error)
    if reason:
        screen.say(f"compiled programs are not kept: {reason} (--compilation-cache names another folder)")
        return None
    return folder


def load_for_answers(
    options: flags.FlagValues, screen: "gptoss_jax.cli.terminal.Screen", engine_config: EngineConfig
) -> tuple["gptoss_jax.runtime.language_model.LanguageModel", "gptoss_jax.engine.engine.Engine"]:
    """The model, and an engine with slots for all its data shards alike, with a progress bar for each.

    Raises:
        GptossError, KeyboardInterrupt: as `load`.
    """
    language_model = load(options, screen, if_random="the text is noise, not an answer")
    slots = language_model.sharding.even_slots(engine_config.slots)
    engine_config = dataclasses.replace(engine_config, slots=slots)
    with interrupts.stopping(screen.say) as pressed, screen.progress("compiling", pressed) as report:
        return language_model, language_model.engine(engine_config, report=report)
