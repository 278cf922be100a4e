"""The user's cache folder: what later runs need not find out again."""

import os
from pathlib import Path

from gptoss_jax import whole_files


def cache_folder() -> Path:
    """By the XDG Base Directory Specification: a relative or empty XDG_CACHE_HOME counts as unset.

    Raises:
        RuntimeError: there is no home at all (containers run under user ids without an account).
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "gptoss_jax"


def keep(file: Path, content: bytes) -> None:
    """Writes a file whole; its folder is made, for its owner only.

    Raises:
        OSError: it cannot be kept; what was there before is still there.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    whole_files.replace(file, content)
