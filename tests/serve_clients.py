"""Clients of a running server, OpenAI's own among them, each a scenario that prints one JSON document.

    python -m tests.serve_clients SCENARIO URL

In a process of their own: the test session lets nobody connect to anything.
"""

import contextlib
import http.client
import json
import socket
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import openai

from tests import structured_clients

SUM = "What is 417 + 258?"
FEW_FILES = 256  # that the demo's server may open
TIME = "What time is it in Tokyo?"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "get_time", "description": "Gives the time of day in a city.", "parameters": PARAMETERS}
CHAT_TOOLS: Any = [{"type": "function", "function": FUNCTION}]
TOOLS: Any = [{"type": "function", **FUNCTION}]
GREEDY: Any = {"model": "gptoss-demo", "temperature": 0}


def get_time(city: str) -> str:
    """What the function gives that the model may call."""
    assert city == "Tokyo"
    return json.dumps({"time": "08:15"})


# ---- OpenAI's client ----


def answers(client: openai.OpenAI, url: str) -> dict[str, Any]:
    """One question in every API, whole and streamed."""
    messages: Any = [{"role": "user", "content": SUM}]
    whole = client.chat.completions.create(messages=messages, **GREEDY)
    chunks = list(
        client.chat.completions.create(messages=messages, stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    likely = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=2, n=2, seed=1, **GREEDY)
    logprobs = likely.choices[1].logprobs
    response = client.responses.create(input=SUM, **GREEDY)
    with client.responses.stream(input=SUM, **GREEDY) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_response()
    prompts: Any = [[976, 17307], "The sky"]
    text = client.completions.create(prompt=prompts, echo=True, max_tokens=1, logprobs=1, **GREEDY)
    return {
        "models": [model.id for model in client.models.list()],
        "chat": whole.choices[0].message.content,
        "reasoning": whole.choices[0].message.model_dump()["reasoning"],
        "finish_reason": whole.choices[0].finish_reason,
        "usage": whole.usage.model_dump() if whole.usage else None,
        "streamed": "".join(delta.content or "" for delta in deltas),
        "streamed_reasoning": "".join(delta.model_dump().get("reasoning") or "" for delta in deltas),
        "streamed_usage": chunks[-1].usage.model_dump() if chunks[-1].usage else None,
        "logprobs": [[each.token, len(each.top_logprobs)] for each in (logprobs and logprobs.content) or []],
        "response": response.output_text,
        "streamed_response": streamed.output_text,
        "kinds": sorted(set(kinds)),
        "echoed": [choice.text for choice in text.choices],
        "echoed_logprobs": [choice.logprobs.token_logprobs for choice in text.choices if choice.logprobs],
    }


def agents(client: openai.OpenAI, url: str) -> dict[str, Any]:
    """A loop with a function through both APIs: whole, streamed, by items given back, and by kept responses."""
    loops = {
        "chat": lambda: _chat_loop(client, _whole_message),
        "chat streamed": lambda: _chat_loop(client, _streamed_message),
        "responses, items": lambda: _response_loop(client, streams=False, keeps=False),
        "responses, items, streamed": lambda: _response_loop(client, streams=True, keeps=False),
        "responses, kept": lambda: _response_loop(client, streams=False, keeps=True),
        "responses, kept, streamed": lambda: _response_loop(client, streams=True, keeps=True),
    }
    return {name: loop() for name, loop in loops.items()}


def _chat_loop(client: openai.OpenAI, ask: Callable[[openai.OpenAI, Any], dict[str, Any]]) -> list[str]:
    messages: list[Any] = [{"role": "user", "content": TIME}]
    said = []
    for _ in range(4):
        message = ask(client, messages)
        messages.append(message)
        for call in message.get("tool_calls") or ():
            function = call["function"]
            said.append(function["name"] + function["arguments"])
            result = get_time(**json.loads(function["arguments"]))
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        if not message.get("tool_calls"):
            return [*said, message["content"]]
    return said


def _whole_message(client: openai.OpenAI, messages: Any) -> dict[str, Any]:
    done = client.chat.completions.create(messages=messages, tools=CHAT_TOOLS, **GREEDY)
    return done.choices[0].message.model_dump(exclude_none=True)


def _streamed_message(client: openai.OpenAI, messages: Any) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": "", "reasoning": "", "tool_calls": []}
    for chunk in client.chat.completions.create(messages=messages, tools=CHAT_TOOLS, stream=True, **GREEDY):
        delta = chunk.choices[0].delta.model_dump(exclude_none=True)
        message["content"] += delta.get("content", "")
        message["reasoning"] += delta.get("reasoning", "")
        for call in delta.get("tool_calls", ()):
            message["tool_calls"].append({name: value for name, value in call.items() if name != "index"})
    return {name: value for name, value in message.items() if value}


def _response_loop(client: openai.OpenAI, *, streams: bool, keeps: bool) -> list[str]:
    items: list[Any] = [{"role": "user", "content": TIME}]
    previous, said = None, []
    for _ in range(4):
        given = {"previous_response_id": previous} if previous else {}
        if streams:
            with client.responses.stream(input=items, tools=TOOLS, **given, **GREEDY) as stream:
                for _event in stream:
                    pass
                response = stream.get_final_response()
        else:
            response = client.responses.create(input=items, tools=TOOLS, **given, **GREEDY)
        results = []
        for item in response.output:
            if item.type == "function_call":
                said.append(item.name + item.arguments)
                result = get_time(**json.loads(item.arguments))
                results.append({"type": "function_call_output", "call_id": item.call_id, "output": result})
        if not results:
            return [*said, response.output_text]
        if keeps:
            previous, items = response.id, results
        else:
            items += [*response.output, *results]
    return said


def errors(client: openai.OpenAI, url: str) -> dict[str, Any]:
    """What OpenAI's client makes of what is refused."""
    messages: Any = [{"role": "user", "content": SUM}]
    hopeless: dict[str, Callable[[], object]] = {
        "model": lambda: client.chat.completions.create(messages=messages, model="gpt-5"),
        "effort": lambda: client.chat.completions.create(messages=messages, reasoning_effort="none", **GREEDY),
        "length": lambda: client.chat.completions.create(messages=messages, max_tokens=10**6, **GREEDY),
        "previous": lambda: client.responses.create(input=SUM, previous_response_id="resp_no", **GREEDY),
    }
    found = {}
    for name, call in hopeless.items():
        try:
            call()
        except openai.APIStatusError as error:
            found[name] = [type(error).__name__, error.code, error.param]
    raw = client.chat.completions.with_raw_response.create(
        messages=messages, reasoning_effort="minimal", extra_body={"best_guess": True}, **GREEDY
    )
    found["headers"] = {name: raw.headers.get(name) for name in ("x-gptoss-ignored", "x-gptoss-mapped")}
    return found


def faults(client: openai.OpenAI, url: str) -> dict[str, Any]:
    """A model whose numbers fail in the middle of an answer, and the wrong key."""
    messages: Any = [{"role": "user", "content": "Hi"}]
    found: dict[str, Any] = {}
    try:
        client.chat.completions.create(messages=messages, model="broken")
    except openai.InternalServerError as error:
        found["whole"] = error.code
    texts = []
    try:
        for chunk in client.chat.completions.create(messages=messages, model="broken", stream=True):
            texts.append(chunk.choices[0].delta.model_dump().get("reasoning") or "")
    except openai.APIError as error:
        found["streamed"] = ["".join(texts), error.code]
    events = []
    try:
        for event in client.responses.create(input="Hi", model="broken", stream=True):
            events.append(event.type)
    except openai.APIError as error:
        found["events"] = [events[0], events[-1], error.code]
    limited = client.chat.completions.create(messages=messages, model="broken", max_tokens=3)
    found["others"] = limited.choices[0].finish_reason
    for name, key in (("wrong", "sk-wrong"), ("none", "")):
        try:
            client.with_options(api_key=key).models.list()
        except openai.AuthenticationError as error:
            found[name] = error.code
        except openai.OpenAIError as error:  # its own, of a missing key
            found[name] = type(error).__name__
    return found


# ---- plain HTTP ----


def leaving(client: openai.OpenAI, url: str) -> dict[str, Any]:
    """Clients that leave: in the middle of a stream, before a whole answer, while they wait for a slot."""
    gone = []
    for number in range(8):
        body = {"prompt": f"{number}: What", "max_tokens": 400, "stream": number % 2 == 0, "logit_bias": _NO_END}
        gone.append(_post(url, "/v1/completions", body))
    _until(lambda: _metrics(url)["gptoss_running"] == 4 and _metrics(url)["gptoss_waiting"] == 4)
    began = time.monotonic()
    for connection in gone:
        connection.close()
    _until(lambda: _metrics(url)["gptoss_running"] == _metrics(url)["gptoss_waiting"] == 0)
    seconds = time.monotonic() - began
    after = _metrics(url)
    return {"seconds": seconds, "leaked_pages": after["gptoss_pages"] - after["gptoss_free_pages"]}


_NO_END = {"200002": -100, "200012": -100, "200007": -100}


def ending(client: openai.OpenAI, url: str) -> dict[str, Any]:
    """Streams that are under way, and one that waits, when the server is asked to end; says when they are."""
    body = {"prompt": "What", "max_tokens": 150, "stream": True, "logit_bias": _NO_END}
    streams = [_post(url, "/v1/completions", body) for _ in range(5)]
    _until(lambda: _metrics(url)["gptoss_running"] == 4 and _metrics(url)["gptoss_waiting"] == 1)
    print("under way", flush=True)
    texts = [connection.getresponse().read().decode() for connection in streams]
    return {
        "done": sum(text.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in text for text in texts),
        "refused": sum('"code":"unavailable"' in text for text in texts),
    }


_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n"
_SLOW = {"nothing": b"", "a head": _HEAD + b"X: ", "a refused body": _HEAD + b"Content-Length: 10000\r\n\r\n"}

_BAD = (b"\0\1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")


def slow(client: openai.OpenAI, url: str) -> dict[str, Any]:
    """Connections that send nothing, or a byte now and then, after bad ones: how long until each is hung up on."""
    parts, began, found = urllib.parse.urlsplit(url), time.monotonic(), dict[str, float]()
    address = (parts.hostname or "", parts.port or 80)
    opened = [(name, first, socket.create_connection(address)) for name, first in _SLOW.items() for _ in range(5)]
    for bad in _BAD:
        with socket.create_connection(address) as end:
            end.sendall(bad)
            assert end.recv(12) in (b"HTTP/1.1 400", b"HTTP/1.1 404")
    for _, first, end in opened:
        end.sendall(first)
        end.setblocking(False)
    while opened and time.monotonic() < began + 60:
        time.sleep(0.5)
        still = []
        for name, first, end in opened:
            if _is_open(end, b"x" if first else b""):
                still.append((name, first, end))
            else:
                found[name] = time.monotonic() - began
        opened = still
    return {"open": len(opened), "seconds": found}


def crowd(client: openai.OpenAI, url: str) -> dict[str, Any]:
    """What those hear who are beyond half of the server's files; then a larger crowd comes at once, and goes.

    Raises:
        TimeoutError: nobody is answered afterwards.
    """
    parts = urllib.parse.urlsplit(url)
    address = (parts.hostname or "", parts.port or 0)
    with contextlib.ExitStack() as opened:
        ends = [opened.enter_context(socket.create_connection(address, 60)) for _ in range(FEW_FILES // 2 + 8)]
        beyond = [end.recv(12).decode() for end in ends[-8:]]
        for _ in range(2 * FEW_FILES):
            end = opened.enter_context(socket.socket())
            end.setblocking(False)
            end.connect_ex(address)
        time.sleep(1)

    def is_well() -> bool:
        with contextlib.suppress(ConnectionError), socket.create_connection(address, 5) as end:
            end.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            return end.recv(12) == b"HTTP/1.1 200"
        return False

    _until(is_well)  # as soon as it has seen that they are gone
    return {"beyond": beyond}


def _is_open(end: socket.socket, more: bytes) -> bool:
    """Whether the other end listens still."""
    try:
        end.send(more)
        while end.recv(4096):
            pass
    except BlockingIOError:
        return True
    except ConnectionError:
        pass
    return False


def _post(url: str, path: str, body: Mapping[str, Any]) -> http.client.HTTPConnection:
    connection = _connection(url)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection


def _connection(url: str) -> http.client.HTTPConnection:
    parts = urllib.parse.urlsplit(url)
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)


def _metrics(url: str) -> dict[str, float]:
    connection = _connection(url)
    connection.request("GET", "/metrics")
    lines: Iterator[str] = iter(connection.getresponse().read().decode().splitlines())
    return {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not come")
        time.sleep(0.02)


SCENARIOS = {each.__name__: each for each in (answers, agents, errors, faults, leaving, slow, crowd, ending)}
SCENARIOS |= structured_clients.SCENARIOS

if __name__ == "__main__":
    scenario, address, *key = sys.argv[1:]
    openai_client = openai.OpenAI(base_url=f"{address}/v1", api_key=key[0] if key else "none", max_retries=0)
    print(json.dumps(SCENARIOS[scenario](openai_client, address)))
