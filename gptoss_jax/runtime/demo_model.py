"""The demo model that comes with the package: an archived checkpoint, unpacked once into the user's cache folder."""

import contextlib
import hashlib
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from gptoss_jax import whole_files
from gptoss_jax.checkpoints.orbax import integrity
from gptoss_jax.checkpoints.orbax.manifest import CheckpointError, Manifest
from gptoss_jax.errors import GptossError
from gptoss_jax.runtime.user_cache import cache_folder

ARCHIVE = Path(__file__).parent / "data" / "demo.zip"
"""Where the package has it. demo.pack makes it."""
MOST_BYTES = 1 << 30  # unpacked: an archive of ours has a tenth

_DATE = (2026, 1, 1, 0, 0, 0)  # of all files in the archive: the same checkpoint gives the same bytes


class DemoModelError(GptossError):
    """There is no demo model, or it cannot be unpacked."""


def folder(archive: Path | None = None, cache: Path | None = None) -> Path:
    """The demo model's checkpoint, unpacked: at once where an earlier run has done it.

    What lies in the cache has been compared with the hashes of its manifest, and is whole or absent: it is unpacked
    beside its place and moved there. Another archive has another place.

    Args:
        archive: a file that `pack` has written; None: the one in the package.
        cache: where it is unpacked; None: in the user's cache folder.

    Raises:
        DemoModelError: this installation has none, it is damaged, or the cache cannot be written.
    """
    archive = archive or ARCHIVE
    if not archive.is_file():
        raise DemoModelError(
            f"this installation has no demo model ({archive.name}): "
            "expected a converted checkpoint or a folder of safetensors"
        )
    try:
        cache = cache or cache_folder()
        target = cache / f"demo-{hashlib.sha256(archive.read_bytes()).hexdigest()[:16]}"
        if not _is_whole(target):
            _unpack(archive, target)
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        raise DemoModelError(
            f"the demo model cannot be unpacked into {cache or 'a cache folder'} ({error}): "
            "set XDG_CACHE_HOME to a folder that can be written, or give --checkpoint"
        ) from None
    return target


def pack(checkpoint: Path, archive: Path) -> int:
    """Writes the archive of a finished checkpoint, whole or not at all; gives its size in bytes.

    Raises:
        CheckpointError: no finished checkpoint.
        WriteError: the archive cannot be written.
    """
    Manifest.read(checkpoint)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    with whole_files.writing(archive) as out, zipfile.ZipFile(out, "w", zipfile.ZIP_LZMA) as packed:
        for file in files:
            entry = zipfile.ZipInfo(file.relative_to(checkpoint).as_posix(), _DATE)
            entry.compress_type, entry.external_attr = zipfile.ZIP_LZMA, 0o644 << 16
            packed.writestr(entry, file.read_bytes())
    return archive.stat().st_size


def _is_whole(target: Path) -> bool:
    """Whether files of the right sizes lie there; hashes were compared when it was unpacked."""
    try:
        records = Manifest.read(target).leaves.values()
    except CheckpointError:
        return False
    files = [(target / record.file, record.file_bytes) for record in records]
    return all(file.is_file() and file.stat().st_size == size_bytes for file, size_bytes in files)


def _unpack(archive: Path, target: Path) -> None:
    """Unpacks beside `target`, compares, and moves there; of two processes that do it at once, either may win."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-demo-", dir=target.parent))
    try:
        _extract(archive, unfinished)
        _check(archive, unfinished)
        if target.exists() and not _is_whole(target):
            shutil.rmtree(target)
        with contextlib.suppress(OSError):  # another process was first
            os.rename(unfinished, target)
        if not _is_whole(target):
            raise OSError(f"{target} is in the way")
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _extract(archive: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as packed:
            names = packed.namelist()
            size_bytes = sum(entry.file_size for entry in packed.infolist())
            if size_bytes > MOST_BYTES or any(name.startswith("/") or ".." in name for name in names):
                raise DemoModelError(f"{archive} is not an archive of demo.pack: install the package again")
            packed.extractall(folder)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise _damaged(archive, str(error)) from None


def _check(archive: Path, folder: Path) -> None:
    try:
        records = Manifest.read(folder).leaves.values()
    except CheckpointError as error:
        raise _damaged(archive, str(error)) from None
    for record in records:
        if not (folder / record.file).is_file() or integrity.stored_sha256(folder, record) != record.sha256:
            raise _damaged(archive, f"{record.path} is not what its manifest says")


def _damaged(archive: Path, why: str) -> DemoModelError:
    return DemoModelError(f"{archive} is damaged ({why}): install the package again, or give --checkpoint")


if __name__ == "__main__":  # for scripts: where it lies
    print(folder())
