"""One answer on its way from the scheduler's thread to a client of the event loop.

    Answer        queues a prompt, turns its ids into text as they arrive
    whole         waits for all of it
    EventStream   sends it as server-sent events; a client that goes away ends the job

Knows no routes and no settings; needs starlette (the extra `serve`).
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from qwen_jax.sampling import SamplingParams
from qwen_jax.slots import Piece
from qwen_jax.tokenizer import Tokenizer
from sample.answer_text import AnswerText
from sample.protocol import DONE, ApiError, Envelope, event, usage
from sample.scheduler import Busy, Closed, Job, Scheduler

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Answer:
    """One prompt, its job, its text so far and why it ended."""

    def __init__(self, tokenizer: Tokenizer, ids: list[int], stops: list[str], *, chat: bool):
        self.prompt = ids
        self.text = AnswerText(tokenizer, stops, chat=chat)
        self.finish: str | None = None
        self._pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._job: Job | None = None
        self._ready = ""  # text that `ready` has taken already
        self._begin = time.perf_counter()

    def start(self, scheduler: Scheduler, params: SamplingParams) -> None:
        """Queues the prompt. Raises ApiError if the server is full or shutting down."""
        loop = asyncio.get_running_loop()

        def deliver(piece: Piece | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        try:
            self._job = scheduler.submit(self.prompt, params, deliver)
        except Busy as error:
            raise ApiError(429, str(error), "server_busy") from None
        except Closed as error:
            raise ApiError(503, str(error), "shutting_down") from None

    def end(self) -> None:
        """Frees the row if the answer is not over; says in the log how it went."""
        if self._job is None:
            return
        self._job.cancel()
        self._job = None
        log.info(
            "%d + %d tokens, %.2f s, %s",
            len(self.prompt),
            self.text.tokens,
            time.perf_counter() - self._begin,
            self.finish or "not finished",
        )

    async def ready(self) -> None:
        """Waits for the first tokens."""
        self._ready = await self._next()

    async def texts(self) -> AsyncIterator[str]:
        """The text as it arrives; at the end `finish` is set."""
        yield self._ready
        while self.finish is None:
            yield await self._next()

    async def _next(self) -> str:
        piece = await self._pieces.get()
        if isinstance(piece, Closed):
            raise ApiError(503, str(piece), "shutting_down")
        if isinstance(piece, Exception):
            raise ApiError(500, f"generation failed ({type(piece).__name__}); see the log")
        text = self.text.push(piece.ids)
        if piece.finish is not None:
            text += self.text.flush()
        if self.text.stopped:
            self._job.cancel()
        self.finish = "stop" if self.text.stopped else piece.finish
        return text


async def whole(answers: list[Answer]) -> list[tuple[str, str]]:
    """(text, finish_reason) of each."""
    return [("".join([text async for text in a.texts()]), a.finish) for a in answers]


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Awaits `work`; raises ClientDisconnect as soon as nobody waits for it any longer."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect()
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


class EventStream(StreamingResponse):
    """An answer as server-sent events, to its end or until the client goes away."""

    def __init__(self, answer: Answer, envelope: Envelope):
        super().__init__(self._events(), media_type="text/event-stream")
        # A proxy must neither keep the text nor hold it back.
        self.headers["Cache-Control"], self.headers["X-Accel-Buffering"] = "no-cache", "no"
        self._answer, self._envelope = answer, envelope

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.end()

    async def _events(self) -> AsyncIterator[bytes]:
        answer, envelope = self._answer, self._envelope
        if first := envelope.first():
            yield event(first)
        try:
            async for text in answer.texts():
                if text:
                    yield event(envelope.part(text, None))
        except ApiError as error:  # the status is sent long ago
            yield event(error.body())
            return
        yield event(envelope.part("", answer.finish))
        if envelope.counted:
            yield event(envelope.total(usage(len(answer.prompt), answer.text.tokens)))
        yield DONE
