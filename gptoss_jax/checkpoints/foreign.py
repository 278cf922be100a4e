"""What people give in place of a checkpoint: each recognised, and named with what to do instead."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from gptoss_jax.errors import one_line, short, shortened
from gptoss_jax.files import FileError, read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapters.safetensors")
_HUB_ID = re.compile(r"(?:(?:https?|hf):/+)?(?:huggingface\.co/)?([\w.-]+/[\w.-]+)")
_RELEASED = ("gpt-oss-20b", "gpt-oss-120b")
_RELEASE = "take the model as OpenAI published it (hf download openai/gpt-oss-20b), or in bfloat16"
_AS_SAFETENSORS = "save it as safetensors: in transformers, from_pretrained(SRC), then save_pretrained(DST)"
# How a file's name ends -> what it is, and what to do.
_SUFFIXES = {
    ".gguf": "GGUF, llama.cpp's format, is not read: convert the published safetensors instead",
    ".bin": f"PyTorch's .bin files are not read, since they may run code: {_AS_SAFETENSORS}",
    ".pt": f"PyTorch's .pt files are not read, since they may run code: {_AS_SAFETENSORS}",
    ".pth": f"PyTorch's .pth files are not read, since they may run code: {_AS_SAFETENSORS}",
    ".ckpt": f"PyTorch's .ckpt files are not read, since they may run code: {_AS_SAFETENSORS}",
    ".h5": f"TensorFlow's .h5 files are not read: {_AS_SAFETENSORS}",
    ".msgpack": f"Flax's .msgpack files are not read: {_AS_SAFETENSORS}",
    ".onnx": f"ONNX files are not read: {_RELEASE}",
}
# How the names of quantised tensors end -> which tool writes them.
_QUANTIZED = {
    re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB)$|\.quant_state\."): "bitsandbytes",
    re.compile(r"\.(qweight|qzeros|g_idx)$"): "GPTQ or AWQ",
    re.compile(r"\.(weight_packed|weight_scale|weight_scale_inv|weight_scale_2)$"): "compressed-tensors or ModelOpt",
    re.compile(r"\.biases$"): "MLX",
}


def no_folder(path: Path) -> str:
    """What is wrong with a path that is no folder."""
    if path.is_symlink() and not path.exists():
        return one_line(f"{path}: a link to {os.readlink(path)}, which is not there, expected a checkpoint's folder")
    if path.exists():
        return one_line(f"{path}: {_file(path)}, expected a checkpoint's folder")
    return one_line(f"{path}: no such folder, expected a checkpoint's folder{_how_to_fetch(path)}")


def _how_to_fetch(path: Path) -> str:
    """What downloads a model that was named as the hub names it."""
    found = _HUB_ID.fullmatch(str(path))
    if found and not path.parent.exists():
        name = found[1]
    elif path.name in _RELEASED:
        name = f"openai/{path.name}"
    else:
        return ""
    return f"; nothing is downloaded here: hf download {name} --local-dir {path.name}, then name that folder"


def _file(path: Path) -> str:
    if path.suffix == ".safetensors":
        return "a safetensors file"
    kind = _SUFFIXES.get(path.suffix.lower()) if path.is_file() else None
    return f"a file ({kind})" if kind else "a file"


def no_checkpoint(folder: Path) -> str:
    """What a folder without a checkpoint is instead; "" if nobody knows."""
    kind = _adapter(folder) or _other_format(folder) or _deeper(folder)
    return one_line(f"{folder}: {kind}") if kind else ""


def _deeper(folder: Path) -> str:
    """A folder of the hub's cache, or another one, that holds folders with checkpoints."""
    inner = ("models--*/snapshots/*", "hub/models--*/snapshots/*", "snapshots/*", "*")
    found = [path.parent for pattern in inner for path in sorted(folder.glob(f"{pattern}/config.json"))]
    if found:
        named = next((path for path in found if "gpt-oss" in str(path.relative_to(folder))), found[0])
        of_hub = "models--" in str(named)
        kind = "of the hub's cache, whose files lie deeper" if of_hub else "no checkpoint, but holds folders with one"
        return f"{kind}: name such a folder, as {named}"
    if any(name.startswith("models--") for name in _names(folder) + _names(folder / "hub")):
        return "the hub's cache, in which no download is whole: hf download openai/gpt-oss-20b fetches one"
    return ""


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _adapter(folder: Path) -> str:
    if not any(os.path.lexists(folder / name) for name in (ADAPTER_CONFIG, *ADAPTER_FILES)):
        return ""
    try:
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    except (FileError, AttributeError):
        base = None
    of_base = f" of {short(base)}" if base else ""
    return (
        f"an adapter{of_base}, not a whole model: merge it first: in peft, "
        "PeftModel.from_pretrained(base, SRC).merge_and_unload().save_pretrained(DST)"
    )


def _other_format(folder: Path) -> str:
    suffixes = {Path(name).suffix.lower() for name in _names(folder)}
    return next((f"no *.safetensors; {kind}" for suffix, kind in _SUFFIXES.items() if suffix in suffixes), "")


def quantization(names: Iterable[str]) -> str:
    """Which tool's quantised weights tensors of these names are, and what to do; "" if none's."""
    for name in sorted(names):
        for pattern, tool in _QUANTIZED.items():
            if pattern.search(name):
                return one_line(f"quantised by {tool} (tensor {shortened(name)}), which is not read: {_RELEASE}")
    return ""
