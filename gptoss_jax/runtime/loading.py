"""`load`: a folder of weights -> a model that is ready to run."""

import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from gptoss_jax.checkpoints import opening, peft
from gptoss_jax.checkpoints.leaf import Leaf, leaf_bytes
from gptoss_jax.errors import GptossError, short
from gptoss_jax.model import adapted, adapters, layers, transformer
from gptoss_jax.model import sharding as sharding_module
from gptoss_jax.model.mesh import MeshShape
from gptoss_jax.model.sharding import Sharding
from gptoss_jax.runtime import kept_programs, weight_transforms
from gptoss_jax.runtime.language_model import LanguageModel
from gptoss_jax.runtime.number_formats import DENSE_ITEMSIZE
from pallas_kernels.choice import Hardware

Report = Callable[[int, int], object]
"""Called with the bytes of weights that are loaded, and of all."""


def load(
    path: str | os.PathLike[str],
    *,
    mesh: str | Path | Mesh | MeshShape | Sharding | None = None,
    dtype: str = "bfloat16",
    dense: str = "bfloat16",
    adapter: str | os.PathLike[str] | None = None,
    kernels: str = "auto",
    programs_folder: str | os.PathLike[str] | None = None,
    report: Report = lambda done_bytes, total_bytes: None,
) -> LanguageModel:
    """The model at `path`, ready to run.

    Args:
        path: a converted (Orbax) checkpoint, or a folder of safetensors in any published format, read as it is.
        mesh: None for one device; "data=2,expert=4,tensor=1"; a .json file; a mesh of some of these axes or its shape.
        dtype: "bfloat16", or "float32" to compute in float32 throughout.
        dense: weights of attention and unembedding: "bfloat16" as stored, or "int8", which halves their bytes and is no
            longer exact (docs/numerics.md has its cost); experts stay as they are.
        adapter: the folder of a PEFT adapter (LoRA), as fine-tuning makes one; its factors stand beside the weights.
        kernels: "auto", or implementations by name, which then run or raise: see `layers.choose_kernels`.
        programs_folder: where the compiled programs of engines are kept for later runs, yours alone; None: nowhere. A
            program is found again by this package's version and sources, not by what your code changed in them.
        report: called with the bytes of weights that are loaded, and of all.

    Raises:
        GptossError: what all of these are; a path or a name of another type; an unknown dtype, dense or kernel; a
            `programs_folder` that cannot be made or written to, or that others can write to.
        SourceError: there is no such folder, or what is published in it is incomplete or damaged.
        ConfigError: its config.json is not a gpt-oss model's.
        AdapterError: the adapter is of another kind or model, or damaged.
        CheckpointError: it is a converted checkpoint that is unfinished, damaged, or not of this model.
        MeshError: the mesh does not fit the devices or the model.
    """
    began = time.perf_counter()
    _checked_path("path", path)
    _check_known("dtype", dtype, transformer.DTYPE_POLICIES)
    _check_known("dense", dense, DENSE_ITEMSIZE)
    programs = _programs_folder(programs_folder)
    policy = transformer.DTYPE_POLICIES[dtype]
    sharding = sharding_module.make(mesh)
    hardware = Hardware.of(sharding.mesh.devices.flat[0])
    choose_kernels = functools.partial(layers.choose_kernels, kernels, hardware, policy.activations)
    chosen, reason = choose_kernels()  # a name that cannot run is found before anything is read
    weights = opening.open_weights(Path(path))
    sharding.check(weights.config, slots=sharding.size("batch"))
    factors = {} if adapter is None else peft.read(Path(_checked_path("adapter", adapter)), weights.config)
    if adapters.have_experts(factors):
        chosen, reason = choose_kernels(expert_adapters=True)
    model = transformer.declare(weights.config, sharding, chosen, policy)
    transforms = [
        weight_transforms.to_devices(model, sharding, weights.config),
        weight_transforms.to_dense_format(model, dense),
        weight_transforms.to_weight_layout(model, chosen.expert_mlp.layout, sharding),
    ]
    stored = weight_transforms.as_stored(model, sharding, weights.config)
    leaves = weight_transforms.apply(transforms, weights.read(stored, sharding))
    leaves = _reported(leaves, model.leaves, report)
    placed = adapted.put(weights.config, factors, sharding)
    params = transformer.nest(dict(adapted.beside(weights.config, leaves, placed)))
    if chosen.few_launches:
        params = weight_transforms.join_projections(params)
    return LanguageModel(
        config=weights.config,
        sharding=sharding,
        params=params,
        model=model,
        policy=policy,
        dense=dense,
        kernels=reason,
        source=weights.described + (f" with an adapter of {len(factors)} matrices" if factors else ""),
        weights_are_random=weights.are_random,
        load_seconds=time.perf_counter() - began,
        programs_folder=programs,
    )


def _checked_path(what: str, path: Any) -> Any:
    if not isinstance(path, str | os.PathLike):
        kind = "a checkpoint" if what == "path" else "a PEFT adapter"
        raise GptossError(f"{what} is {short(path)}, expected the folder of {kind}")
    return path


def _programs_folder(given: str | os.PathLike[str] | None) -> Path | None:
    if given is None:
        return None
    if not isinstance(given, str | os.PathLike):
        raise GptossError(f"programs_folder is {short(given)}, expected a folder or None")
    if reason := kept_programs.why_not(Path(given)):
        raise GptossError(f"programs_folder: {reason}")
    return Path(given)


def _check_known(what: str, name: str, known: Mapping[str, Any]) -> None:
    if not isinstance(name, str) or name not in known:
        raise GptossError(f"{what} is {short(name)}, expected one of {', '.join(known)}")


def _reported(
    leaves: Iterable[tuple[str, Any]], declared: Mapping[str, Leaf], report: Report
) -> Iterator[tuple[str, Any]]:
    """`leaves`, with a report of each."""
    done_bytes, total_bytes = 0, sum(map(leaf_bytes, declared.values()))
    for path, array in leaves:
        done_bytes += leaf_bytes(declared[path])
        report(done_bytes, total_bytes)
        yield path, array
