"""What OpenAI's API looks like on the wire: requests that are read strictly, answers, errors.

A field that OpenAI knows and this server does not do is accepted only with the value that turns it
off, any other field is refused, so that nothing is ignored in silence. `top_k` and
`repetition_penalty` are extensions. Knows no model and no HTTP; needs pydantic (the extra
`serve`).
"""

import json
import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from qwen_jax.errors import did_you_mean

# "null" is what a client sends for an option that it leaves alone.
_Off = Literal[False, 0] | None
_Empty = Annotated[list, Field(max_length=0)] | Annotated[dict, Field(max_length=0)] | None
_Stop = Annotated[str, StringConstraints(min_length=1)]


_TYPES = ("str", "int")


class ApiError(Exception):
    """Becomes a response with this HTTP status and OpenAI's error object."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(_Strict):
    type: Literal["text"]


class GenerationRequest(_Strict):
    """What chat and plain completions share; None means the checkpoint's own setting."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # says who asks; changes nothing, at OpenAI too
    n: int | None = None
    presence_penalty: _Off = None
    frequency_penalty: _Off = None
    logit_bias: _Empty = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """In a stream; the answer that comes whole always has it."""
        return bool(self.stream_options and self.stream_options.include_usage)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    # What an answer of ours has besides; clients send it back as it came.
    refusal: None = None
    tool_calls: _Empty = None
    function_call: None = None
    annotations: _Empty = None
    audio: None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: _Off = None
    response_format: TextFormat | None = None
    tools: _Empty = None
    tool_choice: Literal["none", "auto"] | None = None  # there are no tools to choose from
    functions: _Empty = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None  # kept with stored answers, and none is stored


class CompletionRequest(GenerationRequest):
    prompt: str | list[int] | list[str] | list[list[int]]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None


Request = TypeVar("Request", bound=GenerationRequest)


def read_request(kind: type[Request], body: bytes) -> Request:
    """Parses a body. Raises ApiError 400, in one line, for everything that is wrong with it."""
    try:
        request = kind.model_validate_json(body)
    except pydantic.ValidationError as error:
        raise _explain(kind, error) from None
    if request.n not in (None, 1):
        raise ApiError(400, f"n is {request.n}; this server gives one answer a request", param="n")
    if request.stream_options is not None and not request.stream:
        message = "stream_options is given without stream: true"
        raise ApiError(400, message, param="stream_options")
    return request


def _explain(kind: type[BaseModel], error: pydantic.ValidationError) -> ApiError:
    """The first field's fault: a union lists one for each of its members, most of no use."""
    faults = error.errors(include_url=False)
    faults = [fault for fault in faults if fault["loc"][:1] == faults[0]["loc"][:1]]
    first = max(faults, key=lambda f: (not f["type"].endswith("_type"), len(f["loc"])))
    place = [str(part) for part in first["loc"]]
    if not place:
        return ApiError(400, f"the body is no JSON object: {first['msg']}")
    # Members of a union ("str", "list[int]") stand in the path; a user knows fields.
    path = ".".join(
        part for part in place if part.isdigit() or (part.isidentifier() and part not in _TYPES)
    )
    field, value = place[0], json.dumps(first["input"], default=str, ensure_ascii=False)
    value = value if len(value) <= 60 else value[:57] + "..."
    if first["type"] == "extra_forbidden":
        known = list(kind.model_fields)
        message = f"unknown field {path!r}{did_you_mean(place[-1], known)}"
    elif first["type"] == "missing":
        message = f"the field {path!r} is missing"
    elif field in kind.model_fields and kind.model_fields[field].annotation in (_Off, _Empty):
        hint = "; use repetition_penalty" if field.endswith("_penalty") else ""
        message = f"{field} is {value}; this server does not do it{hint}"
    else:
        message = f"{path} is {value}: {first['msg']}"
    return ApiError(400, message, param=field)


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


class Envelope:
    """Id, time and model that all parts of one answer carry.

    counted   a stream ends with a chunk that has the usage, and every other one has it as null
    """

    def __init__(self, model: str, *, chat: bool, counted: bool):
        self.counted = counted
        self._chat, self._model, self._created = chat, model, int(time.time())
        self._id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex

    def whole(self, answers: list[tuple[str, str]], count: Mapping[str, int]) -> dict[str, Any]:
        """The answer at once; `answers` holds (text, finish_reason)."""
        choices = []
        for index, (text, finish) in enumerate(answers):
            message = {"role": "assistant", "content": text, "refusal": None}
            body = {"message": message} if self._chat else {"text": text}
            choices.append(self._choice(index, body, finish))
        kind = "chat.completion" if self._chat else "text_completion"
        return self._wrap(kind, choices) | {"usage": dict(count)}

    def first(self) -> dict[str, Any] | None:
        """The chunk that opens a streamed chat."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._chunk(self._choice(0, {"delta": delta}, None)) if self._chat else None

    def part(self, text: str, finish: str | None) -> dict[str, Any]:
        """A chunk with text, or the last one, which has a finish_reason."""
        if not self._chat:
            body: dict[str, Any] = {"text": text}
        else:
            body = {"delta": {"content": text} if text else {}}
        return self._chunk(self._choice(0, body, finish))

    def total(self, count: Mapping[str, int]) -> dict[str, Any]:
        """The chunk after the last one that a client asks for with include_usage."""
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return self._wrap(kind, []) | {"usage": dict(count)}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return self._wrap(kind, [choice]) | ({"usage": None} if self.counted else {})

    @staticmethod
    def _choice(index: int, body: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": index, **body, "logprobs": None, "finish_reason": finish}

    def _wrap(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": None,
            "choices": choices,
        }


def event(data: Mapping[str, Any]) -> bytes:
    """One server-sent event. ensure_ascii off: Chinese at half the bytes, and whole characters."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


DONE = b"data: [DONE]\n\n"
