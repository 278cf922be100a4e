"""The routes: which path is which exchange, and what else a server says of itself. No path reaches the file system."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from gptoss_jax.api.asked import Asked
from gptoss_jax.api.completions import Prompt
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony.answer import AnswerStream
from gptoss_jax.server import bodies, chat, completions, metrics, problems, responses
from gptoss_jax.server.access import ANYBODY, Gate, Keys
from gptoss_jax.server.answering import deliver_to
from gptoss_jax.server.chat import ChatExchange
from gptoss_jax.server.completions import CompletionsExchange
from gptoss_jax.server.engine_thread import EngineThread
from gptoss_jax.server.exchange import Exchange, Model, now
from gptoss_jax.server.problems import Problem
from gptoss_jax.server.replies import Reply, Turn, Work
from gptoss_jax.server.responses import ResponsesExchange
from gptoss_jax.server.stored import Stored

MAX_BODY_BYTES = 8 << 20
GRAMMAR_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Served:
    """What a server is made of.

    Attributes:
        model: what answers.
        thread: the engine's, not yet started.
        metrics: counts.
        stored: responses that are kept.
        keys: who may ask.
        origins: pages in browsers that may ask.
        max_body_bytes: of a request.
        on_end: called when the engine's thread has ended, in that thread.
    """

    model: Model
    thread: EngineThread
    metrics: metrics.Metrics
    stored: Stored
    keys: Keys = dataclasses.field(default_factory=Keys)
    origins: Sequence[str] = ()
    max_body_bytes: int = MAX_BODY_BYTES
    on_end: Callable[[], None] = lambda: None


def create(served: Served) -> FastAPI:
    """The app; the engine's thread runs as long as it does."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        served.thread.start(deliver_to(asyncio.get_running_loop()), served.on_end)
        yield
        served.thread.close(0.0)
        await asyncio.to_thread(served.thread.join, 60.0)

    middleware = [Middleware(Gate, keys=served.keys, origins=served.origins)]
    if served.origins:
        origins = list(served.origins)
        middleware.append(Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]))
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan, middleware=middleware)
    _Routes(served).add_to(app)
    app.add_exception_handler(HTTPException, _not_found)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(500, _failed)
    return app


async def _not_found(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    what = "has no such method" if status == 405 else "is nothing here"
    return Problem(status, f"{request.method} {request.url.path[:100]} {what}", code="not_found").response()


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _failed(request: Request, error: Exception) -> Response:
    return Problem(500, "an error of the server's own, which its log has", code="internal_error").response()


class _Routes:
    """What each path does."""

    def __init__(self, served: Served):
        self._served, self._model, self._began = served, served.model, now()
        self._grammar_threads = ThreadPoolExecutor(GRAMMAR_THREADS, thread_name_prefix="grammars")
        self._num_compiling = 0  # requests that ask for a grammar and are being read

    def add_to(self, app: FastAPI) -> None:
        posts = {
            "/v1/chat/completions": self.chat,
            "/v1/completions": self.completions,
            "/v1/responses": self.responses,
        }
        gets = {
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.named_model,
            "/v1/responses/{response_id}": self.kept,
            "/health": self.health,
            "/metrics": self.metrics,
        }
        for path, route in posts.items():
            app.add_api_route(path, route, methods=["POST"])
        for path, route in gets.items():
            app.add_api_route(path, route, methods=["GET"])
        app.add_api_route("/v1/responses/{response_id}", self.forget, methods=["DELETE"])

    # ---- answers ----

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._reply(request, chat.FIELDS, lambda body: ChatExchange(body, self._model))

    async def responses(self, request: Request) -> Response:
        """POST /v1/responses."""
        stored, owner = self._served.stored, _owner(request)
        return await self._reply(
            request, responses.FIELDS, lambda body: ResponsesExchange(body, self._model, stored, owner)
        )

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._reply(request, completions.FIELDS, lambda body: CompletionsExchange(body, self._model))

    async def _reply(
        self, request: Request, fields: frozenset[str], make: Callable[[Mapping[str, Any]], Exchange]
    ) -> Response:
        """The reply to a request."""
        try:
            body = await bodies.read(request, self._served.max_body_bytes)
            exchange, work = await self._read_in_a_thread(body, make)
        except (Problem, GptossError) as error:
            problem = error if isinstance(error, Problem) else problems.of_error(error, fields)
            self._served.metrics.ended(request.url.path, problem.status, problem.code)
            return problem.response()
        return Reply(exchange, work, self._served.thread, self._served.metrics)

    async def _read_in_a_thread(
        self, body: Mapping[str, Any], make: Callable[[Mapping[str, Any]], Exchange]
    ) -> tuple[Exchange, Work]:
        """As `_read`, in another thread, so that others' answers flow: prompts may be long.

        Grammars are compiled in threads of their own, so that nobody waits for one who asks for none; and for no more
        requests than the queue has room for, so that a crowd is sent away before it costs work.
        """
        may_be_held = bodies.may_be_held(body)
        self._served.thread.check_room(1 + (self._num_compiling if may_be_held else 0))
        threads = self._grammar_threads if may_be_held else None
        self._num_compiling += may_be_held
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, self._read, body, make)
        finally:
            self._num_compiling -= may_be_held

    def _read(self, body: Mapping[str, Any], make: Callable[[Mapping[str, Any]], Exchange]) -> tuple[Exchange, Work]:
        """What a request asks, checked.

        Raises:
            GptossError, Problem: something that cannot be.
        """
        exchange, thread = make(body), self._served.thread
        if not isinstance(exchange, CompletionsExchange):
            turn = exchange if isinstance(exchange, ResponsesExchange) and exchange.turn is not None else None
            work = Work(*self._requests(exchange.asked), turn=turn)
            with closing_at_a_fault(turn):
                thread.check(work.requests)
            return exchange, work
        thread.check(self._requests(exchange.to_check)[0])
        scored = exchange

        async def score() -> None:
            prompts = []
            for token_ids, top_logprobs in scored.to_score:
                prompts.append(await self._score(token_ids, top_logprobs))
            if prompts:
                scored.take_scores(prompts)

        return exchange, Work(*self._requests(exchange.asked), prepare=score)

    def _requests(self, asked: Sequence[Asked]) -> tuple[list[Any], list[AnswerStream]]:
        pairs = [each.requests(self._model.tokenizer, self._model.stop_ids) for each in asked]
        return [x for requests, _ in pairs for x in requests], [x for _, streams in pairs for x in streams]

    async def _score(self, token_ids: tuple[int, ...], top_logprobs: int) -> Prompt:
        """In the engine's thread, between two dispatches; of a single token there is nothing to say."""
        if len(token_ids) < 2:
            return Prompt(token_ids)
        job = self._served.thread.call(lambda: self._model.score(token_ids, top_logprobs))
        return await asyncio.wrap_future(job)

    # ---- all else ----

    async def models(self) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model_document(name) for name in self._model.names]})

    async def named_model(self, name: str) -> Response:
        """GET /v1/models/NAME."""
        try:
            self._model.check_name({"model": name})
        except Problem as problem:
            return problem.response()
        return JSONResponse(self._model_document(name))

    def _model_document(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._began, "owned_by": "gptoss_jax"}

    async def kept(self, request: Request, response_id: str) -> Response:
        """GET /v1/responses/ID."""
        found = self._served.stored.find(response_id, _owner(request))
        return JSONResponse(dict(found.response)) if found else _no_response(response_id)

    async def forget(self, request: Request, response_id: str) -> Response:
        """DELETE /v1/responses/ID."""
        if not self._served.stored.drop(response_id, _owner(request)):
            return _no_response(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    async def health(self) -> Response:
        """GET /health: 200 while requests are taken, 503 from then on."""
        is_open = self._served.thread.is_open
        return JSONResponse({"status": "ok" if is_open else "unavailable"}, 200 if is_open else 503)

    async def metrics(self) -> Response:
        """GET /metrics."""
        return Response(self._served.metrics.text(), media_type=metrics.CONTENT_TYPE)


@contextlib.contextmanager
def closing_at_a_fault(turn: Turn | None) -> Iterator[None]:
    """Ends the tools of a request that cannot be answered."""
    try:
        yield
    except BaseException:
        if turn is not None:
            turn.close()
        raise


def _owner(request: Request) -> str:
    return request.scope.get("state", {}).get("owner", ANYBODY)


def _no_response(response_id: str) -> Response:
    return Problem(404, f"response {response_id[:80]!r} is not kept here, or no more", code="not_found").response()
