"""The user's cache folder: what later runs need not find out again."""

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """By the XDG Base Directory Specification: a relative or empty XDG_CACHE_HOME counts as unset.

    Raises:
        RuntimeError: there is no home at all (containers run under user ids without an account).
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "gptoss_jax"


def write_whole(file: Path, content: bytes) -> None:
    """Puts the file there whole or not at all, whatever else writes it at the same time; folders are made.

    Raises:
        OSError: as the file system raises it; what was there before is still there.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, unfinished = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(content)
        os.replace(unfinished, file)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
