"""Packs a trained demo model into the package.

    python -m demo.pack CHECKPOINT
    python -m demo.pack CHECKPOINT --out demo.zip

The checkpoint is compared with its manifest first. The archive is the same, bit
by bit, for the same checkpoint.
"""

if __name__ == "__main__":  # before what takes long to import
    from gptoss_jax.cli import interrupts

    interrupts.end_at_once()

from pathlib import Path

from absl import flags

from gptoss_jax.checkpoints.orbax import integrity
from gptoss_jax.checkpoints.orbax.manifest import Manifest
from gptoss_jax.cli import command
from gptoss_jax.errors import GptossError
from gptoss_jax.runtime import demo_model

MOST_BYTES = 8_000_000  # of the archive: it is committed


def define_flags() -> None:
    """This command's flags."""
    flags.DEFINE_string("out", str(demo_model.ARCHIVE), "FILE: The archive to write.")


def main(arguments: list[str]) -> None:
    """Writes what the flags say."""
    options = flags.FLAGS
    if len(arguments) != 1:
        raise GptossError(f"expected one checkpoint to pack, got {arguments or 'none'}")
    size_bytes = pack(Path(arguments[0]), Path(options.out))
    print(f"{options.out}: {size_bytes:,} bytes")


def pack(checkpoint: Path, archive: Path) -> int:
    """Writes the archive; gives its size in bytes.

    Raises:
        GptossError: the checkpoint is damaged, or the archive would be larger than MOST_BYTES.
    """
    for record in Manifest.read(checkpoint).leaves.values():
        if integrity.stored_sha256(checkpoint, record) != record.sha256:
            raise GptossError(f"{checkpoint / record.file}: its hash is not the manifest's: make the checkpoint again")
    archive.parent.mkdir(parents=True, exist_ok=True)
    size_bytes = demo_model.pack(checkpoint, archive)
    if size_bytes > MOST_BYTES:
        archive.unlink()
        raise GptossError(
            f"{archive} would have {size_bytes:,} bytes, expected {MOST_BYTES:,} at most: are rows that the data do "
            "not use all equal (demo.fresh, demo.seal)?"
        )
    return size_bytes


def cli() -> None:
    """What `python -m` runs."""
    define_flags()
    command.run(main, "pack")


if __name__ == "__main__":
    cli()
