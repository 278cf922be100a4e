"""The whole state of a run on disk, in Orbax's format, so that a process that is killed is gone on from bit for bit.

A state is written beside the others under a name that no reader looks at, and gets its own when it is whole.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from gptoss_jax.errors import GptossError
from gptoss_jax.files import FileError, read_json
from gptoss_jax.whole_files import sync_folder

KEPT = 2
_ARRAYS, _POSITION = "arrays", "position.json"
_UNFINISHED = ".unfinished-"


class StateError(GptossError):
    """A saved state that cannot be read, or is of another run."""


class States:
    """The saved states in one folder: the last few of a run."""

    def __init__(self, folder: Path):
        """`folder` is made when the first state is saved; what a crash left there half written is removed."""
        self.folder = folder
        for leftover in folder.glob(f"{_UNFINISHED}*") if folder.exists() else ():
            shutil.rmtree(leftover)

    def steps(self) -> list[int]:
        """Steps whose states are there, in their order."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.exists() else []
        return sorted(int(found[1]) for name in names if (found := re.fullmatch(r"step-(\d+)", name)))

    def save(self, step: int, state: Any, position: dict[str, Any]) -> Path:
        """Saves a pytree of arrays, and JSON beside it; then removes all but the last `KEPT` states.

        It is on the disk when this returns. A state of this step that is there already is kept.

        Raises:
            OSError: it cannot be written; the states from before are still there.
        """
        path = self.folder / f"step-{step:08d}"
        if path.exists():
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"{_UNFINISHED}{path.name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        _write_arrays(unfinished / _ARRAYS, state)
        (unfinished / _POSITION).write_text(json.dumps({"step": step, **position}, indent=1) + "\n")
        _sync_all(unfinished)
        unfinished.rename(path)
        sync_folder(self.folder)
        for old in self.steps()[:-KEPT]:
            self._remove(old)
        return path

    def _remove(self, step: int) -> None:
        """Under another name first: what is left of it, should this be interrupted, is no state."""
        path = self.folder / f"step-{step:08d}"
        leftover = self.folder / f"{_UNFINISHED}{path.name}"
        shutil.rmtree(leftover, ignore_errors=True)
        path.rename(leftover)
        shutil.rmtree(leftover)

    def position(self, step: int) -> dict[str, Any]:
        """The JSON that was saved with a step's state.

        Raises:
            StateError: it is damaged.
        """
        path = self.folder / f"step-{step:08d}" / _POSITION
        try:
            found = read_json(path)
        except FileError as error:
            raise _damaged(path.parent, error.what) from None
        if not isinstance(found, dict) or found.get("step") != step:
            raise _damaged(path.parent, f"{path.name} is of another step")
        return found

    def restore(self, step: int, like: Any) -> Any:
        """The state of a step, of the shapes, dtypes and shardings of `like`, as `shapes` gives them.

        Raises:
            StateError: it is damaged, or has other arrays than `like`.
        """
        import orbax.checkpoint as ocp

        path = self.folder / f"step-{step:08d}"
        wanted = dict(_named(like))
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                found = checkpointer.restore(path / _ARRAYS, wanted)
        except (ValueError, OSError, KeyError, TypeError) as error:
            raise _damaged(path, " ".join(str(error).split())) from None
        for name, leaf in wanted.items():
            if found[name].shape != leaf.shape or found[name].dtype != leaf.dtype:
                raise _damaged(path, f"{name} is {found[name].dtype}{list(found[name].shape)}")
        return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in wanted])


def shapes(state: Any) -> Any:
    """Shape, dtype and sharding of each array of a pytree, without the arrays."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def _damaged(path: Path, what: str) -> StateError:
    return StateError(f"{path} is damaged ({what[:200]}): remove it, and the run goes on from the state before")


def _named(state: Any) -> Iterator[tuple[str, Any]]:
    """Each array with a name that no other has, and that can name a folder."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        yield jax.tree_util.keystr(path, simple=True, separator="/").replace("/", "."), leaf


def _write_arrays(path: Path, state: Any) -> None:
    import orbax.checkpoint as ocp  # here, since it takes a second

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), dict(_named(state)))
        checkpointer.wait_until_finished()


def _sync_all(folder: Path) -> None:
    """Puts all files below a folder on the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(parent)
