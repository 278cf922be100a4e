"""gzip and zstd as streams, in bounded memory: recognised by their first bytes, written alike for alike content."""

import contextlib
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any, BinaryIO

from gptoss_jax.files import FileError

_BUFFER_BYTES = 1 << 18
# As zstd packs 128 KiB of one byte into four, no more than 128 MiB come out of this much; its window may be as large.
_ZSTD_READ_BYTES = 4096
_ZSTD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # a frame; one to skip, with which pzstd's files begin


class Damaged(Exception):
    """Packed bytes that cannot be unpacked, and why."""


def unpacked(file: io.BufferedReader, name: str) -> io.BufferedReader:
    """What a file holds: the file itself if it is not packed.

    Args:
        file: where it begins.
        name: for errors.

    Raises:
        FileError: it is packed with zstd, whose package is not installed.
        Damaged: what is read on does not unpack.
    """
    head = file.peek(4)
    if head.startswith(b"\x1f\x8b"):
        return io.BufferedReader(_Chunks(_gzip_chunks(file)), _BUFFER_BYTES)
    if _ZSTD.match(head):
        return io.BufferedReader(_Chunks(_zstd_chunks(file, zstandard(name))), _BUFFER_BYTES)
    return file


def _gzip_chunks(file: io.BufferedReader) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file, mode="rb") as unpacking:
        try:
            while chunk := unpacking.read1(_BUFFER_BYTES):
                yield chunk
        except EOFError:
            raise Damaged("the file ends too early") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise Damaged(str(error)) from None


def _zstd_chunks(file: io.BufferedReader, zstandard: ModuleType) -> Iterator[bytes]:
    """Frame by frame: the package's own reader takes a file that was cut for one that ends there."""
    frame, data = None, b""
    while data := data or file.read(_ZSTD_READ_BYTES):
        frame = frame or zstandard.ZstdDecompressor().decompressobj()
        try:
            yield frame.decompress(data)
        except zstandard.ZstdError as error:
            raise Damaged(str(error)) from None
        data = b""
        if frame.eof:
            frame, data = None, frame.unused_data
    if frame:
        raise Damaged("the file ends too early")


class _Chunks(io.RawIOBase):
    """A stream of what an iterator gives, which fills each buffer up to the end."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks, self._chunk = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view, filled = memoryview(buffer).cast("B"), 0
        while filled < len(view):
            if not self._chunk:
                chunk = next(self._chunks, None)
                if chunk is None:
                    break
                self._chunk = memoryview(chunk)
            count = min(len(view) - filled, len(self._chunk))
            view[filled : filled + count] = self._chunk[:count]
            self._chunk, filled = self._chunk[count:], filled + count
        return filled


@contextlib.contextmanager
def packing(out: Any, form: str, name: str) -> Iterator[BinaryIO]:
    """A stream that packs what is written to it into `out`, which stays open.

    Args:
        out: a file to write to.
        form: "gzip", "zstd", or "" for none.
        name: of the file, for errors.

    Raises:
        FileError: zstd's package is not installed.
    """
    if form == "gzip":  # without a name and a time, so that the same content gives the same bytes
        with gzip.GzipFile(filename="", mode="wb", fileobj=out, mtime=0, compresslevel=6) as packed:
            yield packed  # pyright: ignore[reportReturnType]
    elif form == "zstd":
        compressor = zstandard(name).ZstdCompressor(write_checksum=True)
        with compressor.stream_writer(out, closefd=False) as packed:
            yield packed
    else:
        yield out


def zstandard(name: str) -> ModuleType:
    """The package that packs and unpacks zstd.

    Raises:
        FileError: it is not installed.
    """
    try:
        import zstandard
    except ModuleNotFoundError:
        what = "zstd needs the package zstandard: pip install 'gptoss-jax[batch]', or unpack the file, or use gzip"
        raise FileError(name, what) from None
    return zstandard
