"""Serves a model over HTTP: from the flags to a server that runs until a signal, and the exit code."""

import dataclasses
import datetime
import importlib.util
import resource
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from absl import flags

from gptoss_jax.api.asked import Options
from gptoss_jax.api.completions import Prompt
from gptoss_jax.cli import interrupts, model_flags, prompts, sampling_flags, tool_flags
from gptoss_jax.cli.flag_values import naming_flags, token_ids
from gptoss_jax.cli.mistakes import of_file, spelled
from gptoss_jax.cli.terminal import Screen
from gptoss_jax.engine.request import EngineConfig, Request
from gptoss_jax.errors import GptossError
from gptoss_jax.files import decoded
from gptoss_jax.grammar import vocabulary
from gptoss_jax.harmony.tokenizer import Tokenizer, load_tokenizer
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.tools.choice import Offer

if TYPE_CHECKING:
    import gptoss_jax.engine.engine
    import gptoss_jax.runtime.language_model
    import gptoss_jax.server.app

MAX_SLOTS = 1 << 16
USUAL_CONNECTIONS = 1000
_TURNS = 8  # of asyncio's loop, each of which accepts as many as the backlog says, before the first is counted
_SIZES = {(24, 32): "gpt-oss-20b", (36, 128): "gpt-oss-120b"}  # layers and experts -> the published name
_NEEDS = ("fastapi", "uvicorn", "prometheus_client")
_LEAST = {"port": 0, "queue": 0, "max_body_bytes": 1, "stored_responses": 0, "finish_seconds": 0}


def run(options: flags.FlagValues) -> int:
    """Serves until a signal ends it.

    Args:
        options: all flags of `gptoss_jax.serve`.

    Returns:
        The exit code.

    Raises:
        GptossError: flags, files or weights that are not what they should be.
    """
    _check(options)
    most_connections = _most_connections(options.connections)
    screen = Screen(quiet=options.quiet)
    is_demo = options.checkpoint is None
    model_flags.default_to_demo_model(options, screen)
    config = model_flags.config(options)
    defaults, remarks = _defaults(options)
    engine_config = sampling_flags.engine_config(options, options.slots, pool_tokens=options.pool_tokens)
    with naming_flags():  # under which no request can be answered, however short
        given = defaults()
        Request((0,), given.all_stop_ids(config.stop_ids), 1, given.sampling).check(config, engine_config)
    keys = _keys(options.api_key_file)
    names = tuple(options.model_names) or (_name(config, is_demo),)
    for remark in remarks:
        screen.say(remark)
    with tool_flags.offered(options) as offer, _listening(options.host, options.port) as listener:
        return _serve(options, screen, listener, _Parts(names, keys, most_connections, defaults, engine_config, offer))


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What the flags come to."""

    names: tuple[str, ...]
    keys: Sequence[str]
    most_connections: int
    defaults: Callable[[], Options]
    engine_config: EngineConfig
    offer: Offer | None = None


# ---- what the flags say ----


def _check(options: flags.FlagValues) -> None:
    if missing := [name for name in _NEEDS if not importlib.util.find_spec(name)]:
        raise GptossError(f"{' and '.join(missing)} not installed: pip install 'gptoss-jax[serve]'")
    if options.coordinator is not None:
        raise GptossError("--coordinator: a server runs on one host; others can have their own")
    if not 1 <= options.slots <= MAX_SLOTS:
        raise GptossError(f"--slots is {options.slots}, expected 1 to {MAX_SLOTS}")
    for name, least in _LEAST.items():
        value: Any = options[name].value
        if value < least:
            raise GptossError(f"{spelled(name)} is {value}, expected at least {least}")
    if options.port > 65535:
        raise GptossError(f"--port is {options.port}, expected 0 to 65535")
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise GptossError(f"--max-new-tokens is {options.max_new_tokens}, expected at least 1")


def _most_connections(asked: int | None) -> int:
    """Connections at once: each is an open file of the process, half of which are left for everything else."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = sys.maxsize if files == resource.RLIM_INFINITY else files // 2
    if asked is None:
        return min(USUAL_CONNECTIONS, most)
    if not 1 <= asked <= most:
        said = f"expected 1 to {most}, half of the files that this process may open (ulimit -n)"
        raise GptossError(f"--connections is {asked}, {said}")
    return asked


def _keys(path: str | None) -> Sequence[str]:
    if path is None:
        return ()
    keys = [line.strip() for line in decoded(Path(path).read_bytes(), path).splitlines() if line.strip()]
    if not keys:
        raise GptossError(f"{path} holds no key, expected one a line")
    return keys


def _name(config: ModelConfig, is_demo: bool) -> str:
    return "gptoss-demo" if is_demo else _SIZES.get((config.num_layers, config.num_experts), "gpt-oss")


def _defaults(options: flags.FlagValues) -> tuple[Callable[[], Options], list[str]]:
    """Gives what acts where a request says nothing, its date and seed new for each; and remarks on the flags' files."""
    date = None if options.date is None or options.date.lower() == "none" else options.date
    is_today, remarks = date is not None and date.lower() == "today", list[str]()
    settings = prompts.settings(options, None if is_today else date, remarks)
    sampling, has_seed = sampling_flags.sampling(options), options["seed"].present
    given = {
        "max_new_tokens": options.max_new_tokens,
        "stop": tuple(options.stop),
        "stop_ids": token_ids("stop_ids", options.stop_ids),
        "logprobs": sampling.top_logprobs > 0,
    }

    def defaults() -> Options:
        today = datetime.date.today().isoformat()
        acting = dataclasses.replace(settings, current_date=today) if is_today else settings
        drawn = sampling if has_seed else dataclasses.replace(sampling, seed=secrets.randbelow(2**32))
        return Options(acting, drawn, **given)

    return defaults, remarks


def _listening(host: str, port: int) -> socket.socket:
    """A socket with its address, at which nobody is heard before the model is there.

    Raises:
        GptossError: somebody else has it, or there is none such.
    """
    found: socket.socket | None = None
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, number)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        if found is not None:
            found.close()
        raise GptossError(f"--host {host} --port {port}: {of_file(error)}") from None
    return found


# ---- the server ----


def _serve(options: flags.FlagValues, screen: Screen, listener: socket.socket, parts: _Parts) -> int:
    """Loads the model and serves it."""
    vocabulary_made = _begin_vocabulary(load_tokenizer(options.vocab), screen)
    language_model, engine = model_flags.load_for_answers(options, screen, parts.engine_config)
    if vocabulary_made is not None:
        engine.runner.compile_held()
        vocabulary_made.join()
    import uvicorn

    from gptoss_jax.server import app, engine_thread
    from gptoss_jax.server.connection import BoundedConnection

    thread = engine_thread.EngineThread(engine, most_waiting=options.queue)
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    class Connection(BoundedConnection):
        """One of as many as there may be."""

        most_open = parts.most_connections

    class Server(uvicorn.Server):
        """One that says when it is heard, and whose signals reach the engine."""

        async def startup(self, *arguments: Any, **named: Any) -> None:
            await super().startup(*arguments, **named)
            screen.say(f"serving {', '.join(parts.names)} at {url}/v1")

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            thread.close(0.0 if self.should_exit else options.finish_seconds)
            super().handle_exit(sig, frame)

    def end() -> None:
        server.should_exit = True

    served = _served(options, language_model, engine, thread, parts, end)
    config = uvicorn.Config(
        app.create(served),
        http=Connection,
        backlog=max(1, parts.most_connections // _TURNS),
        ws="none",
        log_config=None,
        log_level="error",  # of warnings there is one for whatever anybody sends
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=int(options.finish_seconds) + 10,
    )
    server = Server(config)
    if not parts.keys and not _is_local(host):
        screen.say(f"anybody who reaches {host} may ask: --api-key-file gives keys")
    with interrupts.noted_with_sigterm() as signalled:
        server.run(sockets=[listener])
        number = signalled()
    thread.close(0.0)
    thread.join()
    if thread.failure is not None:
        raise thread.failure
    screen.note("ended")
    return interrupts.EXIT_CODE if number == signal.SIGINT else 0


def _begin_vocabulary(tokenizer: Tokenizer, screen: Screen) -> threading.Thread | None:
    """Makes what grammars need of the vocabulary while the model is loaded; None: answers cannot be held to any.

    It takes seconds in which no other thread runs, so nobody may be served before.
    """
    if names := vocabulary.missing():
        screen.note(f"answers cannot be held to schemas without {' and '.join(names)}: {vocabulary.INSTALL}")
        return None
    thread = threading.Thread(target=vocabulary.prepare, args=(tokenizer,), daemon=True)
    thread.start()
    return thread


def _served(
    options: flags.FlagValues,
    language_model: "gptoss_jax.runtime.language_model.LanguageModel",
    engine: "gptoss_jax.engine.engine.Engine",
    thread: Any,
    parts: _Parts,
    on_end: Callable[[], None],
) -> "gptoss_jax.server.app.Served":
    from gptoss_jax.server import access, app, exchange, metrics, stored, tool_turn

    def score(ids: Sequence[int], top_logprobs: int) -> Prompt:
        scores = language_model.score(ids, top_logprobs=top_logprobs)
        tops = zip(scores.top_ids.tolist(), scores.top_logprobs.tolist(), strict=True)
        return Prompt(ids, scores.logprobs.tolist(), [list(zip(*pair, strict=True)) for pair in tops])

    tokenizer = load_tokenizer(options.vocab)
    model = exchange.Model(
        parts.names,
        tokenizer,
        engine.config.stop_ids,
        parts.defaults,
        options.vocab,
        score,
        None if parts.offer is None else tool_turn.ServerTools(parts.offer, options.tool_rounds),
        parts.engine_config.max_context_tokens,
    )
    return app.Served(
        model,
        thread,
        metrics.Metrics(thread, engine),
        stored.Stored(options.stored_responses),
        access.Keys(parts.keys),
        tuple(options.allow_origins),
        options.max_body_bytes,
        on_end,
    )


def _is_local(host: str) -> bool:
    return host == "::1" or host.startswith("127.")
