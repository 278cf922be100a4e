"""A run of fine-tuning, from flags to exit code: what the flags and files show is said before JAX is imported."""

import dataclasses
import hashlib
import importlib.metadata
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from gptoss_jax.checkpoints import opening
from gptoss_jax.checkpoints.identity import identity
from gptoss_jax.cli import finetune_flags, interrupts, mistakes, model_flags
from gptoss_jax.cli.flag_values import naming_flags
from gptoss_jax.cli.terminal import Screen
from gptoss_jax.errors import GptossError, short
from gptoss_jax.model import mesh
from gptoss_jax.model.config import ModelConfig, read_config
from gptoss_jax.training import feed, memory
from gptoss_jax.training import options as train_options
from gptoss_jax.training.feed import Feed
from gptoss_jax.training.options import TrainOptions
from gptoss_jax.training.run_folder import RunFolder, RunRecord

if TYPE_CHECKING:
    import gptoss_jax.training.loop
    import gptoss_jax.training.step

_PACKAGES = ("gptoss-jax", "jax", "jaxlib", "flax", "optax", "numpy", "ml_dtypes")  # the bits depend on them

_NEEDED = {"data": "files of conversations, JSONL", "output": "a folder for the run"}


def run(options: flags.FlagValues, arguments: Sequence[str]) -> int:
    """Does what the flags ask for; gives the exit code.

    Raises:
        GptossError: flags, files, weights or devices are not what they should be; or a loss is no number.
        OSError: something cannot be written.
    """
    if arguments:
        raise GptossError(f"unexpected argument {short(arguments[0])}: files of conversations go into --data")
    asked, (validation, share) = finetune_flags.train_options(options), finetune_flags.validation(options)
    screen = Screen(quiet=options.quiet)
    config = _config(options)
    for name, what in _NEEDED.items():
        if not options.dry_run and not options[name].value:
            raise GptossError(f"--{name} is missing, expected {what}")
    sources = feed.Sources(tuple(options.data), tuple(validation), share)
    if options.dry_run:
        return _dry_run(screen, options, asked, config, sources)
    with RunFolder(Path(options.output), _record(options, asked, sources)) as folder:
        return _Run(screen, options, asked, config, sources, folder).run()


def _config(options: flags.FlagValues) -> ModelConfig:
    if not options.checkpoint:
        raise GptossError("--checkpoint is missing, expected a converted checkpoint or a folder of safetensors")
    path = Path(options.checkpoint)
    if options.dry_run and path.is_file():
        return read_config(path)
    return opening.open_weights(path).config


def _record(options: flags.FlagValues, asked: TrainOptions, sources: feed.Sources) -> RunRecord:
    """What the run's bits depend on; --dtype=auto is what a machine makes of it, and the machine is not part of it."""
    as_asked = {
        **train_options.to_dict(asked),
        "dtype": options.dtype,
        "mesh": options.mesh,
        "kernels": options.kernels,
    }
    return RunRecord(
        asked=as_asked | {"validation_share": sources.share},
        data={
            "training": [_sha256(name) for name in sources.training],
            "validation": [_sha256(name) for name in sources.validation],
        },
        source={"weights": identity(Path(options.checkpoint))},
        versions={name: importlib.metadata.version(name) for name in _PACKAGES if _is_installed(name)},
    )


def _sha256(name: str) -> str:
    try:
        with open(name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise GptossError(f"{name}: {error.strerror}") from None


def _is_installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:  # a checkout
        return False


def _read(screen: Screen, asked: TrainOptions, sources: feed.Sources, folder: Path | None) -> Feed:
    """The conversations as batches, and what people should know of them on stderr."""
    with screen.status() as show:
        found = feed.read(sources, asked, folder, report=lambda count: show(f"conversations so far: {count:,}"))
    for remark in found.remarks:
        screen.note(remark)
    return found


def _dry_run(
    screen: Screen, options: flags.FlagValues, asked: TrainOptions, config: ModelConfig, sources: feed.Sources
) -> int:
    """Says what the run would take, on stdout."""
    rows = None
    if sources.training:
        found = _read(screen, asked, sources, None)
        rows = None if found.vocabulary is None else len(found.vocabulary)
        screen.answer(f"{found.described}\nsteps: {found.total_steps:,}\n")
    shards = mesh.num_shards(options.mesh)
    if options.dtype == finetune_flags.AUTO:
        screen.note("--dtype is auto: float32, as on CPUs, is what is counted")
    kept, again = (
        memory.memory(config, dataclasses.replace(asked, rematerialize=rematerialize), shards, vocab_rows=rows)
        for rematerialize in (False, True)
    )
    screen.answer("\n".join(["bytes on each device:", *memory.table(kept, again, asked)]) + "\n")
    return 0


class _Run:
    """One process's part of a run."""

    def __init__(
        self,
        screen: Screen,
        options: flags.FlagValues,
        asked: TrainOptions,
        config: ModelConfig,
        sources: feed.Sources,
        folder: RunFolder,
    ):
        self._screen, self._options, self._asked = screen, options, asked
        self._config, self._sources, self._folder = config, sources, folder

    def run(self) -> int:
        """Trains, and writes the result; gives the exit code."""
        for line in self._folder.version_changes:
            self._screen.say(f"{line}: the same bits are not promised")
        result = self._folder.result(self._asked.method)
        if result.exists():
            self._screen.note(f"nothing is left to do: {result} is there")
            return 0
        try:
            data = _read(self._screen, self._asked, self._sources, self._folder.corpora)
            self._screen.note(data.described)
            trainer = self._trainer(data)
            return self._train(data, trainer)
        except (GptossError, OSError):
            self._folder.abandon()
            raise
        except RuntimeError as error:
            if mistakes.of_memory(error):  # with other flags it is another run
                self._folder.abandon()
            raise

    def _trainer(self, data: Feed) -> "gptoss_jax.training.step.Trainer":
        options, screen = self._options, self._screen
        with interrupts.ended_by_ctrl_c():
            import jax

            from gptoss_jax.training.step import Trainer

        model_flags.note_device_memory(screen)
        if options.dtype == finetune_flags.AUTO:
            is_cpu = jax.default_backend() == "cpu"
            self._asked = dataclasses.replace(self._asked, dtype="float32" if is_cpu else "bfloat16")
        screen.note("reading weights")
        with interrupts.ended_by_ctrl_c(), naming_flags():
            trainer = Trainer.open(
                options.checkpoint,
                self._asked,
                total_steps=data.total_steps,
                mesh=options.mesh or None,
                kernels=options.kernels,
                rows=None if data.vocabulary is None else data.vocabulary.ids,
            )
        screen.note(trainer.kernels)
        return trainer

    def _train(self, data: Feed, trainer: "gptoss_jax.training.step.Trainer") -> int:
        from gptoss_jax.training.loop import Loop, Schedule
        from gptoss_jax.training.speed import Pace, matrix_rate

        options, screen, rows = self._options, self._screen, data.vocabulary
        pace = Pace(
            self._config,
            data.total_steps,
            method=self._asked.method,
            rate=matrix_rate(list(trainer.sharding.mesh.devices.flat)),
            vocab_rows=None if rows is None else len(rows),
        )
        schedule = Schedule(data.total_steps, options.log_every, options.evaluate_every, options.save_every)
        outcome = self._loop(lambda **hands: Loop(trainer, data, self._folder, schedule, pace, **hands))
        screen.note(pace.summary())
        if outcome.signal:
            screen.say(f"interrupted after step {outcome.step:,}, which is saved: the same command goes on")
            return 128 + outcome.signal
        self._finish(trainer, outcome)
        return 0

    def _loop(self, made: "Callable[..., gptoss_jax.training.loop.Loop]") -> "gptoss_jax.training.loop.Outcome":
        """Runs a loop that signals stop after a step. A second Ctrl-C ends the process: a step may compile for long."""
        screen, outcome = self._screen, None
        with interrupts.noted_with_sigterm() as terminated:
            try:
                with interrupts.stopping(screen.say) as pressed, screen.status() as show:

                    def stopped() -> int:
                        return terminated() or (int(signal.SIGINT) if pressed() else 0)

                    outcome = made(note=screen.note, show=show, stopped=stopped).run()
            except KeyboardInterrupt:  # that is how `stopping` ends
                if outcome is None:
                    raise
        return outcome

    def _finish(self, trainer: "gptoss_jax.training.step.Trainer", outcome: "gptoss_jax.training.loop.Outcome") -> None:
        from gptoss_jax.training import result  # here, since it takes long to import

        last = outcome.last
        trained = {"steps": outcome.step, "loss": last and last.loss, "validation_loss": last and last.validation_loss}
        options = train_options.to_dict(self._asked)
        lora, path = self._asked.lora, self._folder.result(self._asked.method)
        if lora is None:
            provenance: dict[str, Any] = {"trained_by": "gptoss_jax.finetune", "run": trained, "options": options}
            result.write_checkpoint(self._folder, trainer, outcome.state, provenance)
        else:
            from gptoss_jax.checkpoints import peft

            base = os.path.abspath(self._options.checkpoint)
            peft.write(path, self._config, trainer.trained_adapters(outcome.state), alpha=lora.alpha, base=base)
        self._screen.note(f"{path} is written; {self._folder.path} has metrics.csv and the loss plot")
