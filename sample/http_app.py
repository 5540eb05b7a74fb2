"""The HTTP side of the server: requests to jobs of the scheduler, their ids to answers.

    GET  /health               GET  /v1/models, /v1/models/{id}
    POST /v1/chat/completions  POST /v1/completions

The event loop only waits and decodes a few tokens at a time; prompts are encoded in worker
threads, generation has a thread of its own. A client that goes away cancels its jobs. What it
knows of the model are its tokenizer, its context and its defaults; needs starlette (the extra
`serve`).
"""

import contextlib
import hmac
import secrets
import time
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from qwen_jax import chatml
from qwen_jax.engine import check_ids
from qwen_jax.errors import InputError
from qwen_jax.generation_config import GenerationDefaults
from qwen_jax.sampling import SamplingParams
from qwen_jax.tokenizer import Tokenizer
from sample.answers import Answer, EventStream, unless_gone, whole
from sample.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    Envelope,
    GenerationRequest,
    read_request,
    usage,
)
from sample.scheduler import Scheduler

# Bytes of a request: some 4 million tokens, far more than any context.
MOST_BYTES = 16 * 2**20
# Prompts in one request of /v1/completions.
MOST_PROMPTS = 128


@dataclass(frozen=True, kw_only=True)
class Served:
    """The model as requests see it."""

    name: str
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    context: int  # tokens of prompt and answer together
    system: str = chatml.DEFAULT_SYSTEM
    api_key: str | None = None


def create_app(served: Served, scheduler: Scheduler) -> Starlette:
    """The ASGI application; it closes the scheduler when it ends."""
    routes = _Routes(served, scheduler)

    @contextlib.asynccontextmanager
    async def lifespan(_app):
        yield
        await run_in_threadpool(scheduler.close)

    return Starlette(
        routes=[
            Route("/health", routes.health),
            Route("/v1/models", routes.guarded(routes.models)),
            Route("/v1/models/{name:path}", routes.guarded(routes.model)),
            Route("/v1/chat/completions", routes.guarded(routes.chat), methods=["POST"]),
            Route("/v1/completions", routes.guarded(routes.completions), methods=["POST"]),
        ],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
            Exception: _bug,
        },
        lifespan=lifespan,
    )


async def _api_error(_request: Request, error: ApiError) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    return JSONResponse(error.body(), error.status, headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    what = f"{request.method} {request.url.path}: {error.detail.lower()}"
    return JSONResponse(ApiError(error.status_code, what).body(), error.status_code, error.headers)


async def _gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _bug(_request: Request, _error: Exception) -> Response:
    return JSONResponse(ApiError(500, "internal error; see the log").body(), 500)


class _Routes:
    def __init__(self, served: Served, scheduler: Scheduler):
        self.served, self.scheduler = served, scheduler
        self.started = int(time.time())

    def guarded(self, endpoint):
        """Asks for the key first."""

        async def checked(request: Request) -> Response:
            if self.served.api_key is not None:
                given = request.headers.get("authorization", "").encode()
                # Compared in constant time: a timing must not tell how much of a key is right.
                if not hmac.compare_digest(given, f"Bearer {self.served.api_key}".encode()):
                    message = "wrong or missing API key; send Authorization: Bearer KEY"
                    raise ApiError(401, message, "invalid_api_key")
            return await endpoint(request)

        return checked

    async def health(self, _request: Request) -> Response:
        counts = {"running": self.scheduler.running, "waiting": self.scheduler.waiting}
        return JSONResponse({"status": "ok"} | counts)

    async def models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._model())

    async def chat(self, request: Request) -> Response:
        wanted = read_request(ChatRequest, await _body(request))
        self._check_name(wanted.model)
        if None not in (wanted.max_tokens, wanted.max_completion_tokens):
            raise ApiError(
                400, "give either max_tokens or max_completion_tokens", param="max_tokens"
            )
        most = wanted.max_tokens if wanted.max_tokens is not None else wanted.max_completion_tokens
        ids = await run_in_threadpool(self._encode_chat, wanted)
        return await self._answer(request, wanted, [ids], most)

    async def completions(self, request: Request) -> Response:
        wanted = read_request(CompletionRequest, await _body(request))
        self._check_name(wanted.model)
        prompts = await run_in_threadpool(self._encode_prompts, wanted)
        return await self._answer(request, wanted, prompts, wanted.max_tokens)

    def _model(self) -> dict:
        name, context = self.served.name, self.served.context
        base = {"id": name, "object": "model", "created": self.started, "owned_by": "qwen-jax"}
        return base | {"max_model_len": context}

    def _check_name(self, name: str) -> None:
        if name != self.served.name:
            message = f"there is no model {name!r} here; this server has {self.served.name!r}"
            raise ApiError(404, message, "model_not_found", "model")

    def _encode_chat(self, wanted: ChatRequest) -> list[int]:
        """Nothing is dropped from a long history: it is the client that keeps it."""
        turns = [
            chatml.Turn("system" if m.role == "developer" else m.role, m.text)
            for m in wanted.messages
        ]
        try:
            return chatml.encode_prompt(
                self.served.tokenizer, turns, self.served.system, max_window_size=2**31
            )
        except InputError as error:
            raise ApiError(400, str(error), param="messages") from None

    def _encode_prompts(self, wanted: CompletionRequest) -> list[list[int]]:
        given = wanted.prompt
        prompts = (
            [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
        )
        if not 1 <= len(prompts) <= MOST_PROMPTS:
            message = f"there are {len(prompts)} prompts; expected 1 to {MOST_PROMPTS}"
            raise ApiError(400, message, param="prompt")
        if wanted.stream and len(prompts) > 1:
            raise ApiError(
                400,
                f"a stream has one prompt, not {len(prompts)}; leave out stream",
                param="prompt",
            )
        tokenizer = self.served.tokenizer
        encoded = [tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
        try:
            for number, ids in enumerate(encoded, start=1):
                check_ids(ids, tokenizer.n_vocab, f"prompt {number}")
        except InputError as error:
            raise ApiError(400, str(error), param="prompt") from None
        return encoded

    def _params(self, wanted: GenerationRequest, most: int | None, prompt: int) -> SamplingParams:
        """The checkpoint's settings with those of the request over them, within the context."""
        defaults, room = self.served.defaults, self.served.context - prompt
        if room < (1 if most is None else most):
            raise ApiError(
                400,
                f"the prompt has {prompt} tokens and max_tokens is {1 if most is None else most}, "
                f"but prompt and answer together may have {self.served.context}",
                "context_length_exceeded",
                "messages" if isinstance(wanted, ChatRequest) else "prompt",
            )
        try:
            return defaults.sampling_params(
                temperature=wanted.temperature,
                top_k=wanted.top_k,
                top_p=wanted.top_p,
                repetition_penalty=wanted.repetition_penalty,
                max_new_tokens=min(defaults.max_new_tokens, room) if most is None else most,
                # A seed is 32 bits here and 64 at OpenAI.
                seed=secrets.randbits(32) if wanted.seed is None else wanted.seed % 2**32,
            )
        except InputError as error:
            message = str(error).replace("max_new_tokens", "max_tokens")
            raise ApiError(400, message, param=message.split()[0]) from None

    async def _answer(
        self,
        request: Request,
        wanted: GenerationRequest,
        prompts: list[list[int]],
        most: int | None,
    ) -> Response:
        chat = isinstance(wanted, ChatRequest)
        params = [self._params(wanted, most, len(ids)) for ids in prompts]
        answers = [Answer(self.served.tokenizer, ids, wanted.stops, chat=chat) for ids in prompts]
        envelope = Envelope(self.served.name, chat=chat, counted=wanted.wants_usage)
        try:
            for answer, own in zip(answers, params, strict=True):
                answer.start(self.scheduler, own)
            if wanted.stream:
                # Only then the status is sent: what fails before the first token has its own.
                await unless_gone(request, answers[0].ready())
                return EventStream(answers.pop(), envelope)
            texts = await unless_gone(request, whole(answers))
        finally:
            for answer in answers:
                answer.end()
        count = usage(sum(len(a.prompt) for a in answers), sum(a.text.tokens for a in answers))
        return JSONResponse(envelope.whole(texts, count))


async def _body(request: Request) -> bytes:
    """The body, as long as it is not absurdly large."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            raise ApiError(413, f"the request has more than {MOST_BYTES} bytes")
    return bytes(body)
