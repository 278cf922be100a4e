"""The safetensors files of a folder and the index that says which tensor is in which: opened, and compared."""

import os
from pathlib import Path
from typing import Any

from gptoss_jax.checkpoints.safetensors_reader import SafetensorsFile, open_file, tensor_fault
from gptoss_jax.errors import Fault, shortened
from gptoss_jax.files import FileError, read_json

INDEX = "model.safetensors.index.json"


def open_files(folder: Path) -> tuple[dict[str, SafetensorsFile], list[Fault], set[str]]:
    """Files by name; faults of headers, of the index, and between files; tensors whose file cannot be read."""
    weight_map, faults = _read_index(folder / INDEX)
    present = {path.name for path in folder.glob("*.safetensors")}
    files = {name: open_file(folder / name) for name in sorted(present)}
    placed: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        placed.setdefault(name, set()).add(tensor)
    if weight_map:
        stray = f"not named in {INDEX}: remove it, or name it there"
        faults += [Fault(str(folder / name), stray) for name in sorted(present - placed.keys())]
    absent = set()
    for name in sorted(placed.keys() - present):
        gone = f"missing, and with it {len(placed[name])} tensors that {INDEX} places there"
        faults.append(Fault(str(folder / shortened(name)), gone))
        absent |= placed[name]
    for name, file in files.items():
        faults += file.faults
        absent |= file.names - file.tensors.keys() if file.names else placed.get(name, set())
    return files, faults + _index_faults(folder, weight_map, files) + _duplicates(files), absent


def _read_index(path: Path) -> tuple[dict[str, str], list[Fault]]:
    if not os.path.lexists(path):
        return {}, []  # one file needs none, and OpenAI's format has none
    try:
        weight_map = _weight_map(read_json(path))
        return (weight_map, []) if weight_map else ({}, [Fault(str(path), "no index of safetensors: fetch it again")])
    except FileError as error:
        return {}, [Fault(str(path), f"no index of safetensors ({error.what}): fetch it again")]


def _weight_map(index: Any) -> dict[str, str]:
    """Tensor -> file, all of them in the index's folder; empty if it is no index."""
    found = index.get("weight_map") if isinstance(index, dict) else None
    right = isinstance(found, dict) and all(
        isinstance(file, str) and Path(file).name == file for file in found.values()
    )
    return found if right and found else {}


def _index_faults(folder: Path, weight_map: dict[str, str], files: dict[str, SafetensorsFile]) -> list[Fault]:
    """Where index and headers disagree."""
    faults, named = [], set(weight_map.values())
    for tensor, name in sorted(weight_map.items()):
        if name in files and files[name].names and tensor not in files[name].names:
            faults.append(tensor_fault(folder / name, tensor, f"not in this file, though {INDEX} places it there"))
    for name, file in files.items():
        for tensor in sorted(file.names) if name in named else ():
            if (place := weight_map.get(tensor)) != name:
                faults.append(tensor_fault(file.path, tensor, f"{INDEX} places it in {shortened(place or 'no file')}"))
    return faults


def _duplicates(files: dict[str, SafetensorsFile]) -> list[Fault]:
    faults, seen = [], {}
    for name, file in files.items():
        for tensor in sorted(file.names):
            if tensor in seen:
                faults.append(tensor_fault(file.path, tensor, f"duplicate, also in {seen[tensor]}"))
            seen[tensor] = name
    return faults
