"""Text that users give in files, whatever system wrote them: UTF-8, perhaps with a byte order mark."""

import codecs

from gptoss_jax.errors import GptossError

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_UTF_32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)  # the first begins as UTF-16 does


def decoded(data: bytes, name: str) -> str:
    """The text of a file, without a byte order mark.

    Args:
        data: all of the file.
        name: what errors call it.

    Raises:
        GptossError: it is no UTF-8; UTF-16 and UTF-32 are named, with a way to convert them.
    """
    for encoding, found in (("UTF-32", data.startswith(_UTF_32)), ("UTF-16", _looks_like_utf_16(data))):
        if found:
            raise GptossError(
                f"{name} is {encoding}, expected UTF-8: convert it with `iconv -f {encoding} -t UTF-8`, or have "
                "PowerShell write UTF-8 (`| Out-File -Encoding utf8 FILE` in place of `> FILE`)"
            )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GptossError(
            f"{name} is not valid UTF-8 at byte {error.start}; if it is in Windows' older encoding, "
            "`iconv -f WINDOWS-1252 -t UTF-8` converts it"
        ) from None


def _looks_like_utf_16(data: bytes) -> bool:
    """By its mark, or since every other byte of nearly all of it is zero, as in Latin text without a mark."""
    start = data[:1024]
    zeros = max(start[0::2].count(0), start[1::2].count(0))
    return data.startswith(_UTF_16) or (len(start) > 1 and zeros > 0.4 * len(start))
