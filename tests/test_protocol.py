"""Requests are read strictly: what is wrong is named, nothing is ignored."""

import json

import openai.types.chat
import pytest

from sample.protocol import ApiError, ChatRequest, CompletionRequest, Envelope, read_request, usage

CHAT = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
PLAIN = {"model": "m", "prompt": "a"}


def read(kind, body):
    return read_request(kind, json.dumps(body).encode())


def test_what_clients_send_for_options_that_are_off():
    off = {
        "n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "tools": [],
        "tool_choice": "none", "response_format": {"type": "text"}, "logprobs": False, "stop": None,
        "store": False, "user": "someone", "metadata": {"a": "b"}, "stream": False,
    }  # fmt: skip
    request = read(ChatRequest, CHAT | off | {"stop": ["x", "y"], "top_k": 3})
    assert request.stops == ["x", "y"] and request.top_k == 3
    assert read(CompletionRequest, PLAIN | {"best_of": 1, "echo": False, "logprobs": None})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tempratur": 1}, "unknown field 'tempratur'; did you mean 'temperature'?"),
        ({"model": None}, "model is null: Input should be a valid string"),
        ({"max_tokens": "3"}, 'max_tokens is "3": Input should be a valid integer'),
        ({"max_tokens": True}, "max_tokens is true: Input should be a valid integer"),
        ({"temperature": "hot"}, 'temperature is "hot": Input should be a valid number'),
        ({"stream": 1}, "stream is 1: Input should be a valid boolean"),
        ({"stop": ""}, 'stop is "": String should have at least 1 character'),
        ({"stop": ["a"] * 17}, "should have at most 16"),
        ({"n": 2}, "n is 2; this server gives one answer a request"),
        ({"presence_penalty": 0.5},
         "presence_penalty is 0.5; this server does not do it; use repetition_penalty"),
        ({"tools": [{"type": "function"}]}, "this server does not do it"),
        ({"logprobs": True}, "logprobs is true"),
        ({"response_format": {"type": "json_object"}}, "Input should be 'text'"),
        ({"stream_options": {"include_usage": True}}, "stream_options is given without stream"),
        ({"messages": []}, "should have at least 1 item"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 'messages.0.role is "tool"'),
        ({"messages": [{"role": "user"}]}, "the field 'messages.0.content' is missing"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content is 3"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages.0.content"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]},
         "unknown field 'messages.0.name'"),
    ],
)  # fmt: skip
def test_what_is_refused(change, message):
    with pytest.raises(ApiError) as error:
        read(ChatRequest, CHAT | change)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert error.value.status == 400 and error.value.param == next(iter(change))


@pytest.mark.parametrize(
    "body", [b"", b"[", b"[]", b'"a"', b"\xff", b'{"model": "\\ud800"}', b"[" * 10**5]
)
def test_bodies_that_are_no_object(body):
    with pytest.raises(ApiError) as error:
        read_request(ChatRequest, body)
    assert error.value.status == 400 and "\n" not in str(error.value)


@pytest.mark.parametrize("prompt", [None, [1.5], ["a", 1], [[1], "a"], [[["a"]]], {}])
def test_prompts_of_a_wrong_type(prompt):
    with pytest.raises(ApiError, match="prompt") as error:
        read(CompletionRequest, PLAIN | {"prompt": prompt})
    assert error.value.param == "prompt"


def test_answers_have_the_shape_of_openai():
    envelope = Envelope("m", chat=True, counted=False)
    strict = {"strict": True}
    openai.types.chat.ChatCompletion.model_validate(
        envelope.whole([("hi", "stop")], usage(3, 4)), **strict
    )
    for chunk in (envelope.first(), envelope.part("a", None), envelope.part("", "length")):
        openai.types.chat.ChatCompletionChunk.model_validate(chunk, **strict)
    plain = Envelope("m", chat=False, counted=True)
    openai.types.Completion.model_validate(plain.whole([("a", "stop")], usage(1, 1)), **strict)
    openai.types.Completion.model_validate(plain.part("a", "stop"), **strict)
    assert plain.first() is None and plain.total(usage(1, 2))["usage"]["total_tokens"] == 3
