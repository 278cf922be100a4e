"""Events as clients cut them into lines."""

import json

from gptoss_jax.server import events


def test_no_text_ends_a_line():
    """Guards answers with U+2028 and its like: httpx's and Python's `splitlines` take these for ends of lines."""
    document = {"type": "a", "text": "".join(map(chr, range(0x2100)))}
    [plain], [named] = events.data([document]), events.named([document])
    assert [json.loads(line[6:]) for line in plain.decode().splitlines() if line] == [document]
    name, data = named.decode().rstrip("\n").splitlines()
    assert (name, json.loads(data[6:])) == ("event: a", document)
