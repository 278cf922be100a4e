"""Adapters as the PEFT library keeps them: a folder of adapter_config.json and adapter_model.safetensors.

Attention, router and unembedding have the names of transformers' modules. The experts of a layer are two 3-D parameters
of one module, which PEFT adapts by `target_parameters`: factors of all experts lie in one matrix, and the wrapper of
the second parameter contains that of the first (peft/tuners/lora/layer.py, ParamWrapper).
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import numpy as safetensors_numpy

from gptoss_jax.checkpoints.safetensors_reader import open_file
from gptoss_jax.checkpoints.unfinished import UnfinishedFolder
from gptoss_jax.errors import GptossError, short
from gptoss_jax.files import FileError, read_json
from gptoss_jax.model import adapters
from gptoss_jax.model.adapters import LowRank
from gptoss_jax.model.config import ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODULES = {
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "moe/router": "mlp.router",
    "moe/gate_up": "mlp.experts.base_layer",  # the wrapper inside, of the first of two adapted parameters
    "moe/down": "mlp.experts",
}
"""Our name of a matrix in a layer, and where transformers' model has its adapter."""

PARAMETERS = {
    "moe/router": "mlp.router.weight",
    "moe/gate_up": "mlp.experts.gate_up_proj",
    "moe/down": "mlp.experts.down_proj",
}
"""Those that are no module of their own: what `target_parameters` calls them."""

UNSUPPORTED = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias")
"""Keys of adapter_config.json that would change what the factors mean; refused where they are set."""

_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
_COPY = "lm_head.base_layer.weight"  # PEFT saves the base's unembedding with an adapter of it
_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


class AdapterError(GptossError):
    """A folder that is no adapter, or not one that this model can take."""


def write(
    folder: Path, config: ModelConfig, factors: Mapping[str, LowRank], *, alpha: float, base: str | None = None
) -> None:
    """Writes a folder that PEFT and `read` load, whole or not at all.

    Args:
        folder: must not exist.
        config: of the model that the adapters are for.
        factors: float32, by matrix as in "layers/0/attention/q", b without the scale alpha / rank.
        alpha: the scale times the rank.
        base: what the model is called, for adapter_config.json.

    Raises:
        GptossError: `folder` exists or cannot be made; adapters that are not of this model.
    """
    adapters.check(config, factors)
    ranks = sorted({pair.b.shape[-1] for pair in factors.values()})
    if len(ranks) != 1:
        raise AdapterError(f"adapters of ranks {ranks}: expected one rank, and at least one adapter")
    tensors = {f"base_model.model.{name}": array for name, array in _named(factors)}
    with UnfinishedFolder(folder) as unfinished:
        unfinished.add(CONFIG, json.dumps(_config(factors, ranks[0], alpha, base), indent=2).encode() + b"\n")
        unfinished.add(WEIGHTS, safetensors_numpy.save(tensors, metadata={"format": "pt"}))
        unfinished.finish()


def _named(factors: Mapping[str, LowRank]) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors as PEFT calls them and lays them out."""
    both = {path.rpartition("/")[2] for path in factors} >= {"gate_up", "down"}
    for path, (a, b) in factors.items():
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        rank, module = b.shape[-1], _module(path, both=both)
        if path.endswith(adapters.GROUPS["experts"]):
            a = a.reshape(-1, a.shape[-1])  # [E R, in]
            b = b.transpose(1, 2, 0).reshape(b.shape[1], -1)  # [out, R E]: the experts of one column side by side
        yield f"{module}.lora_A.weight", np.ascontiguousarray(a.reshape(a.shape[0], -1))
        yield f"{module}.lora_B.weight", np.ascontiguousarray(b if b.ndim == 2 else b.reshape(-1, rank))


def _module(path: str, *, both: bool) -> str:
    """The wrapped module; `both`: whether both of the experts' parameters are adapted, so that one is nested."""
    if path == "unembedding":
        return "lm_head"
    _, layer, name = path.split("/", 2)
    if name == "moe/gate_up" and not both:
        name = "moe/down"
    return f"model.layers.{layer}.{MODULES[name]}"


def _config(factors: Mapping[str, LowRank], rank: int, alpha: float, base: str | None) -> dict[str, Any]:
    names = {path.split("/", 2)[-1] for path in factors}
    modules = [MODULES[name].rpartition(".")[2] for name in MODULES if name in names and name not in PARAMETERS]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,  # of inference; PEFT refuses another beside target_parameters
        "bias": "none",
        "target_modules": modules + (["lm_head"] if "unembedding" in names else []),
        "target_parameters": [PARAMETERS[name] for name in MODULES if name in names and name in PARAMETERS] or None,
        "use_rslora": False,
        "use_dora": False,
    }


# ---- reading ----


def read(folder: Path, config: ModelConfig) -> dict[str, LowRank]:
    """The adapters in `folder`, float32, the scale in b.

    Raises:
        AdapterError: it is no LoRA adapter, one of a kind that is not supported, damaged, or of another model.
    """
    try:
        said = read_json(folder / CONFIG)
    except FileError as error:
        raise AdapterError(f"{error}; expected the folder of a PEFT adapter") from None
    if not isinstance(said, dict):
        raise AdapterError(f"{folder / CONFIG}: expected an object of keys and values, got {short(said)}")
    scale = _scale(folder, said)
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, array in _tensors(folder / WEIGHTS, config).items():
        path, factor = _path(folder, name, said)
        found.setdefault(path, {})[factor] = array
    known = adapters.targets(config)
    paired = {path: _factors(folder, path, pair, known, said["r"]) for path, pair in found.items()}
    if not paired:
        raise AdapterError(f"{folder / WEIGHTS}: no tensors, expected lora_A and lora_B of each adapted module")
    return {path: LowRank(a, b * np.float32(scale)) for path, (a, b) in paired.items()}


def _scale(folder: Path, said: Mapping[str, Any]) -> float:
    """alpha / rank, of a configuration whose every other key leaves the factors' meaning as it is."""
    where = folder / CONFIG
    if said.get("peft_type") != "LORA":
        raise AdapterError(f"{where}: peft_type is {short(said.get('peft_type'))}, expected 'LORA'")
    for key in UNSUPPORTED:
        if said.get(key):
            raise AdapterError(f"{where}: {key} is {short(said[key])}, which is not supported: expected none")
    if said.get("bias", "none") != "none":
        raise AdapterError(f"{where}: bias is {short(said['bias'])}, expected 'none': biases are not adapted")
    rank, alpha = said.get("r"), said.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError(f"{where}: r is {short(rank)} and lora_alpha {short(alpha)}, expected two numbers")
    return alpha / math.sqrt(rank) if said.get("use_rslora") else alpha / rank


def _tensors(path: Path, config: ModelConfig) -> dict[str, np.ndarray]:
    """Read without JAX, which safetensors' own reader of bfloat16 would put on a device."""
    table = config.vocab_size, config.hidden_size
    file = open_file(path)
    if file.faults:
        raise AdapterError(f"{file.faults[0]}; copy the adapter again")
    found = {}
    for name, entry in file.tensors.items():
        if name.endswith(_COPY) and entry.shape == table:
            continue
        if entry.dtype not in _DTYPES:
            raise AdapterError(f"{path}: tensor {short(name)} is {entry.dtype}, expected one of {', '.join(_DTYPES)}")
        found[name] = entry.read().view(_DTYPES[entry.dtype]).reshape(entry.shape)
    return found


def _path(folder: Path, name: str, said: Mapping[str, Any]) -> tuple[str, str]:
    """Our name of the matrix that a tensor belongs to, and which factor it is."""
    where = f"{folder / WEIGHTS}: tensor {short(name)}"
    if not (match := _NAME.fullmatch(name)):
        raise AdapterError(f"{where}: expected names that end with lora_A.weight or lora_B.weight")
    module, factor = match[1], match[2].lower()
    if module == "lm_head":
        return "unembedding", factor
    of_layer = _LAYER.fullmatch(module)
    places = {place: ours for ours, place in MODULES.items()}
    if of_layer is None or of_layer[2] not in places:
        raise AdapterError(f"{where}: this model has no such module, expected one of {', '.join(MODULES.values())}")
    ours = places[of_layer[2]]
    if ours == "moe/down" and not _adapts(f"{module}.down_proj", said.get("target_parameters")):
        ours = "moe/gate_up"  # alone: nothing is wrapped inside
    return f"layers/{of_layer[1]}/{ours}", factor


def _adapts(parameter: str, asked: Any) -> bool:
    """Whether one of the names in `target_parameters`, which may be ends of names, means this parameter."""
    names = asked if isinstance(asked, list) else []
    return any(f".{parameter}".endswith(f".{name}") for name in names)


def _factors(
    folder: Path, path: str, pair: Mapping[str, np.ndarray], known: Mapping[str, adapters.Target], rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Both factors as we lay them out."""
    where = f"{folder / WEIGHTS}: {path}"
    if path not in known:
        raise AdapterError(f"{where}: this model has no such layer; is it another model's adapter?")
    if pair.keys() != {"a", "b"}:
        raise AdapterError(f"{where}: lora_{'B' if 'a' in pair else 'A'} is missing; copy the adapter again")
    target, (a, b) = known[path], (pair["a"].astype(np.float32), pair["b"].astype(np.float32))
    experts = target.experts or 1
    wanted = (experts * rank, math.prod(target.inputs)), (math.prod(target.out), experts * rank)
    if (a.shape, b.shape) != wanted:
        raise AdapterError(
            f"{where}: factors of shapes {a.shape} and {b.shape}, expected {wanted[0]} and {wanted[1]} of rank {rank}; "
            "is it another model's adapter?"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise AdapterError(f"{where}: holds NaN or infinity; take an adapter from before training diverged")
    shapes = target.shapes(rank)
    if target.experts:
        b = b.reshape(b.shape[0], -1, experts).transpose(2, 0, 1)
    return a.reshape(shapes.a), np.ascontiguousarray(b.reshape(shapes.b))
