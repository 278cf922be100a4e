"""A lowered program and what its compiler made of it: memory, collectives, operations, shardings, texts."""

import contextlib
import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gptoss_jax.errors import GptossError
from gptoss_jax.hlo import live, module, operations, sent
from gptoss_jax.hlo.live import Buffer
from gptoss_jax.hlo.module import Module
from gptoss_jax.hlo.operations import Operation
from gptoss_jax.hlo.sent import Sent
from gptoss_jax.model import layers, sharding
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.runtime import compile_only, kernel_work, lowering
from gptoss_jax.runtime.lowering import AbstractModel, StepShape
from gptoss_jax.runtime.program_memory import ProgramMemory, logged, program_memory
from pallas_kernels.choice import Hardware


class LeafSharding(NamedTuple):
    """Where one argument lies, as the compiled program says.

    Attributes:
        path: params/layers/0/attention/q/weight, cache/k/1.
        shape: of the whole array.
        dtype: its name.
        spec: the mesh axes that cut each of its axes.
        shard_shape: of the part on each device.
        shard_bytes: of that, without padding.
        sharding: JAX's own object.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: tuple[Any, ...]
    shard_shape: tuple[int, ...]
    shard_bytes: int
    sharding: Any


class LoweredStep:
    """One program of an engine, lowered; compiled when something is asked for that the compiler knows.

    Attributes:
        model: what it was lowered from.
        shape: the sizes that it is for.
        lowered: JAX's object.
    """

    def __init__(self, model: AbstractModel, shape: StepShape, platform: str, options: Mapping[str, Any] = {}):
        """Lowers for `platform`, as `gptoss_jax.runtime.compile_only.Target` names it; `options` are of XLA.

        Raises:
            MeshError: the mesh does not cut the model and the slots evenly.
        """
        self.model, self.shape = model, shape
        self.lowered = lowering.lower(model, shape, platform)
        self._platform, self._options = platform, options

    @functools.cached_property
    def _compiled(self) -> tuple[Any, list[Buffer], str]:
        """The compiled program; its temporaries at the peak, of which XLA reports in files; a TPU's compiler's log."""
        with tempfile.TemporaryDirectory() as folder:
            dumps = {} if self._platform == "tpu" else {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            listen = logged() if self._platform == "tpu" else contextlib.nullcontext([""])
            try:
                with listen as said:
                    compiled = self.lowered.compile(compiler_options={**self._options, **dumps})
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                raise GptossError(
                    f"the compiler says that it does not fit: {str(error).splitlines()[0][:200]}"
                ) from None
            return compiled, live.at_peak(Path(folder), module.parse(compiled.as_text())), said[0]

    @property
    def compiled(self) -> Any:
        """JAX's object of the compiled program.

        Raises:
            GptossError: the compiler says that it does not fit the devices.
        """
        return self._compiled[0]

    @property
    def buffers(self) -> list[Buffer]:
        """What is alive when the program takes most memory, the largest first: arguments, and temporaries.

        Of the temporaries none where the compiler does not say, as that for TPUs.
        """
        return sorted([*live.arguments(self.module), *self._compiled[1]], key=lambda buffer: -buffer.bytes)

    @property
    def stablehlo(self) -> str:
        """What the compiler was given."""
        return self.lowered.as_text()

    @functools.cached_property
    def text(self) -> str:
        """What the compiler made of it: HLO, scheduled."""
        return self.compiled.as_text()

    @functools.cached_property
    def module(self) -> Module:
        """`text`, read."""
        return module.parse(self.text)

    @property
    def memory(self) -> ProgramMemory:
        """Bytes of one device; of a TPU that was here before, JAX's count, which has gaps twice."""
        return program_memory(self.compiled, self._compiled[2])

    @property
    def collectives(self) -> list[Sent]:
        """Every array that devices send one another, with its layer, operation and line of source."""
        return sent.of_module(self.module)

    @functools.cached_property
    def operations(self) -> list[Operation]:
        """What a device does in one step, in the order of the schedule."""
        return kernel_work.with_kernels(
            operations.of_step(self.module), self.model.config, self.model.sharding, self.shape
        )

    @property
    def flops(self) -> dict[str, float]:
        """Multiplications and additions of one device in a step, by named scope: attention, experts, unembedding."""
        found: dict[str, float] = {}
        for each in self.operations:
            if each.flops:
                found[each.scope.part] = found.get(each.scope.part, 0.0) + each.times * each.flops
        return found

    @property
    def launches(self) -> int:
        """Kernels, copies and calls of a step: what a device is asked to start."""
        return sum(each.times for each in self.operations)

    @property
    def shardings(self) -> list[LeafSharding]:
        """Where every argument lies, by the compiled program."""
        placed = self.compiled.input_shardings[0]
        arguments = self.lowered.in_avals[0]
        named = dict(zip(("params", "cache", "options", "state"), zip(arguments, placed, strict=False), strict=False))
        return [leaf for name, (avals, shardings) in named.items() for leaf in _leaves(name, avals, shardings)]

    def dump(self, folder: Path) -> list[Path]:
        """Writes the program to files: StableHLO, compiled text, protos of the module and its buffers.

        Returns:
            What was written.

        Raises:
            OSError: the folder cannot be made, or written to.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (hlo,) = self.compiled.runtime_executable().hlo_modules()
        contents = {
            "stablehlo.mlir": self.stablehlo.encode(),
            "compiled.hlo.txt": self.text.encode(),
            "compiled.hlo.pb": hlo.as_serialized_hlo_module_proto(),
            "buffer_assignment.pb": self.compiled.memory_analysis().serialized_buffer_assignment_proto,
        }
        written = []
        for name, content in contents.items():
            if content:  # compilers for GPUs and TPUs give no assignment
                path = folder / f"{self.shape.name}.{name}"
                path.write_bytes(content)
                written.append(path)
        return written


def _leaves(name: str, avals: Any, shardings: Any) -> list[LeafSharding]:
    paths, _ = jax.tree_util.tree_flatten_with_path(avals)
    found = []
    for (path, aval), placed in zip(paths, jax.tree.leaves(shardings), strict=True):
        shard = placed.shard_shape(aval.shape)
        size = aval.dtype.itemsize
        for length in shard:
            size *= length
        full = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = tuple(getattr(placed, "spec", ()))
        found.append(LeafSharding(f"{name}/{full}", aval.shape, str(aval.dtype), spec, shard, size, placed))
    return found


def on_target(
    config: ModelConfig, mesh: Any, shape: StepShape, target: compile_only.Target, *, kernels: str = "auto"
) -> LoweredStep:
    """A step of a model that is not loaded, lowered for devices that can be compiled for.

    Args:
        config: the model's numbers.
        mesh: as `sharding.make` takes it.
        shape: sizes of the program.
        target: the devices.
        kernels: as `load` takes them; auto: those that such devices run.

    Raises:
        GptossError: the compiler is not installed, a kernel is not known, or the mesh does not fit.
    """
    devices = compile_only.devices(target)
    chosen, _ = layers.choose_kernels(kernels, target.hardware or Hardware.of(devices[0]))
    model = lowering.abstract_model(config, sharding.make(mesh, devices), chosen)
    return LoweredStep(model, shape, target.lowering_platform, target.options)


def of_loaded(loaded: Any, mesh: Any, *, batch: int, context_tokens: int, prefill_tokens: int) -> LoweredStep:
    """What `LanguageModel.lower` says; `loaded` is a LanguageModel.

    Raises:
        GptossError: as there.
    """
    config, limit = loaded.config, loaded.config.max_context_tokens
    if not 1 <= context_tokens <= limit:
        raise GptossError(f"context_tokens is {context_tokens}, expected 1 to {limit}, which the model has")
    if not 1 <= prefill_tokens <= context_tokens:
        raise GptossError(f"prefill_tokens is {prefill_tokens}, expected 1 to context_tokens, {context_tokens}")
    if batch < 1:
        raise GptossError(f"batch is {batch}, expected 1 or more")
    shape = StepShape(batch, context_tokens, prefill_tokens)
    platform = loaded.mesh.devices.flat[0].platform
    of_platform = "cuda" if platform == "gpu" else platform, compile_only.QUICKLY if platform == "cpu" else {}
    if mesh is None:
        params = jax.tree.map(_shape_of, loaded.params)
        model = AbstractModel(config, loaded.sharding, loaded.model, params, loaded.policy)
        return LoweredStep(model, shape, *of_platform)
    if any(map(_is_adapted, jax.tree.leaves(loaded.params, is_leaf=_is_adapted))):
        raise GptossError("mesh: this model has an adapter, whose factors lie on its own mesh: load it on that mesh")
    laid_out = sharding.make(mesh)
    chosen, _ = layers.choose_kernels("auto", Hardware.of(laid_out.mesh.devices.flat[0]), loaded.policy.activations)
    model = lowering.abstract_model(config, laid_out, chosen, loaded.policy, loaded.dense)
    return LoweredStep(model, shape, *of_platform)


def _is_adapted(x: Any) -> bool:
    return isinstance(x, layers.Adapted)


def _shape_of(array: jax.Array) -> jax.ShapeDtypeStruct:
    placed: Any = array.format  # pyright: ignore[reportAttributeAccessIssue]  (as JAX's stubs have it)
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=placed)
