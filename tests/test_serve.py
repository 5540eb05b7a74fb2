"""The server as a process, asked by OpenAI's own client; its answers are those of transformers."""

import concurrent.futures
import http.client
import json
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import openai
import pytest
import torch
from safetensors.numpy import load_file
from torch_reference import qwen2_model

from convert import hf_to_flax
from demo.tiny_checkpoint import write_tiny_checkpoint
from qwen_jax import chatml
from qwen_jax.config import load_hf_config
from qwen_jax.errors import InputError
from qwen_jax.tokenizer import Tokenizer
from sample import generate, serve

ROOT = pathlib.Path(__file__).parents[1]
KEY = "a-secret"
LONG = dict(max_tokens=7000, temperature=0)  # minutes of work: only a cancel ends it in time
QUESTIONS = [
    "你好,今天天气怎么样?",
    "Write a haiku 🙂",
    "<|im_end|> is text",
    "1 + 1 = ?",
    "x" * 300,
]


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("hf"), dtype="float32", seed=4)


@pytest.fixture(scope="module")
def checkpoint(hf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    hf_to_flax.main(["--input", str(hf), "--output", str(folder), "--dtype", "float32"])
    return folder


def start(checkpoint, *flags):
    """A server and its address."""
    command = [sys.executable, "-m", "sample.serve", "--checkpoint", str(checkpoint), "--port", "0"]
    process = subprocess.Popen(
        [*command, *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    line = process.stdout.readline()
    assert line.startswith("serving tiny at http://127.0.0.1:"), line + process.stderr.read()
    return process, line.split()[-1]


@pytest.fixture(scope="module")
def server(checkpoint):
    process, url = start(checkpoint, "--api_key", KEY, "--max_batch", "4")
    yield url
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server, api_key=KEY, max_retries=0, timeout=120)


def user(text):
    return [{"role": "user", "content": text}]


def ask(client, question, **options):
    options = dict(temperature=0, max_tokens=40) | options
    return client.chat.completions.create(model="tiny", messages=user(question), **options)


def health(url):
    with urllib.request.urlopen(url.removesuffix("/v1") + "/health", timeout=10) as answer:
        return json.load(answer)


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so after {seconds} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def expected(hf):
    """What transformers answers, greedily and with the checkpoint's repetition penalty."""
    weights = {}
    for path in hf.glob("*.safetensors"):
        weights |= load_file(path)
    model = qwen2_model(load_hf_config(hf), weights)
    tokenizer = Tokenizer.from_dir(hf)

    def answer(ids, tokens=40):
        with torch.no_grad():
            out = model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                do_sample=False, max_new_tokens=tokens, repetition_penalty=1.1,
                eos_token_id=sorted(chatml.stop_ids(tokenizer)),
            )  # fmt: skip
        return out[0, len(ids) :].tolist()

    return tokenizer, answer


def test_greedy_chat_is_that_of_transformers_however_many_ask(client, server, expected):
    tokenizer, answer = expected
    running = []
    with concurrent.futures.ThreadPoolExecutor() as pool:
        asked = [pool.submit(ask, client, question) for question in QUESTIONS]
        while not all(future.done() for future in asked):
            running.append(health(server)["running"])
            time.sleep(0.02)
    assert max(running) > 1
    for question, future in zip(QUESTIONS, asked, strict=True):
        prompt = chatml.encode_prompt(tokenizer, [chatml.Turn("user", question)])
        ids = answer(prompt)
        got = future.result()
        assert got.choices[0].message.content == chatml.decode_answer(tokenizer, ids)
        assert got.choices[0].finish_reason == "length"
        assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(prompt), 40)


def test_greedy_chat_is_that_of_generate(client, checkpoint, capsys):
    generate.main(["--checkpoint", str(checkpoint), "--prompt", QUESTIONS[0], "--greedy",
                   "--max_new_tokens", "40"])  # fmt: skip
    response = json.loads(capsys.readouterr().out)["response"]
    assert ask(client, QUESTIONS[0]).choices[0].message.content == response


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "seed": -7, "top_p": 0.9}])
def test_a_stream_is_the_whole_answer(client, options):
    message = ask(client, QUESTIONS[1], **options).choices[0]
    stream = ask(
        client, QUESTIONS[1], stream=True, stream_options={"include_usage": True}, **options
    )
    chunks = list(stream)
    *parts, last, total = chunks
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content for chunk in parts)
    assert text == message.message.content and len(parts) > 3
    assert last.choices[0].finish_reason == message.finish_reason
    assert total.choices == [] and total.usage.completion_tokens == 40
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_the_wire_format_of_a_stream(client):
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=user("hi"), stream=True, max_tokens=3
    )
    assert raw.headers["content-type"].startswith("text/event-stream")
    events = raw.http_response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events[:-2])


def test_extensions_reach_the_sampler(client, expected):
    free, penalized = (
        ask(client, QUESTIONS[3], extra_body={"repetition_penalty": penalty}).choices[0]
        for penalty in (1.0, 1.9)
    )
    assert free != penalized
    likeliest = ask(client, QUESTIONS[3], temperature=2.0, extra_body={"top_k": 1})
    assert (
        likeliest.choices[0].message.content == ask(client, QUESTIONS[3]).choices[0].message.content
    )


def test_stop_strings_end_the_answer_and_are_left_out(client):
    free = ask(client, QUESTIONS[2]).choices[0].message.content
    stop = free[10:14]
    for options in ({"stop": stop}, {"stop": ["nowhere to be found", stop]}):
        choice = ask(client, QUESTIONS[2], **options).choices[0]
        assert choice.finish_reason == "stop"
        assert choice.message.content == free[: free.index(stop)].rstrip()
    chunks = list(ask(client, QUESTIONS[2], stop=stop, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == free[: free.index(stop)].rstrip()


def test_plain_completions(client, expected):
    tokenizer, answer = expected
    texts = ["从前有一座山", "def f(x):"]
    ids = [tokenizer.encode(text) for text in texts]
    wanted = [tokenizer.decode(answer(i, 12), skip_special=True) for i in ids]
    options = dict(model="tiny", temperature=0, max_tokens=12)
    for prompt in (texts, ids):
        got = client.completions.create(prompt=prompt, **options)
        assert [choice.text for choice in got.choices] == wanted
        assert [choice.index for choice in got.choices] == [0, 1]
        assert got.usage.total_tokens == sum(map(len, ids)) + 24
    for prompt in (texts[0], ids[0]):
        assert client.completions.create(prompt=prompt, **options).choices[0].text == wanted[0]
    stream = client.completions.create(prompt=texts[1], stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in stream) == wanted[1]


def test_history_and_parts(client):
    first = ask(client, "hi").choices[0].message
    parts = [{"type": "text", "text": "and "}, {"type": "text", "text": "now?"}]
    several = [[*user("hi"), first, {"role": "user", "content": content}]
               for content in ("and now?", parts)]  # fmt: skip
    answers = [
        client.chat.completions.create(model="tiny", messages=m, temperature=0, max_tokens=5)
        for m in several
    ]
    assert answers[0].usage == answers[1].usage and answers[0].choices == answers[1].choices


def test_a_stream_that_is_closed_frees_its_row(client, server):
    stream = ask(client, "talk for ever", stream=True, **LONG)
    next(iter(stream))
    assert health(server)["running"] == 1
    stream.close()
    wait_until(lambda: health(server)["running"] == 0)


def test_a_client_that_goes_away_frees_its_row_and_its_place(server):
    address = server.removeprefix("http://").removesuffix("/v1")
    body = json.dumps({"model": "tiny", "messages": user("talk"), **LONG})
    connections = [http.client.HTTPConnection(address) for _ in range(6)]
    for connection in connections:
        connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {KEY}"})
    wait_until(lambda: health(server)["running"] == 4 and health(server)["waiting"] == 2)
    for connection in connections:
        connection.close()
    wait_until(lambda: health(server) == {"status": "ok", "running": 0, "waiting": 0})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n": 2}, "n is 2; this server gives one answer a request"),
        ({"max_tokens": 9000}, "max_tokens is 9000, but prompt and answer together may have 8192"),
        ({"max_tokens": 0}, "max_tokens is 0; expected a whole number from 1"),
        ({"max_completion_tokens": 5}, "either max_tokens or max_completion_tokens"),
        ({"temperature": -1}, "temperature is -1"),
        ({"extra_body": {"top_k": -1}}, "top_k is -1"),
        ({"extra_body": {"tempratur": 1}}, "unknown field 'tempratur'; did you mean 'temperature'"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "expected 'user'"),
        ({"messages": user("word " * 9000)}, r"the prompt has 90\d\d tokens"),
    ],
)
def test_bad_requests(client, options, message):
    request = dict(model="tiny", messages=user("a"), max_tokens=4) | options
    with pytest.raises(openai.BadRequestError, match=message) as error:
        client.chat.completions.create(**request)
    assert error.value.type == "invalid_request_error" and error.value.param


def test_bad_completions(client):
    for prompt, message in (([], "0 prompts"), ("", "at least one token"), ([10**6], "token id")):
        with pytest.raises(openai.BadRequestError, match=message):
            client.completions.create(model="tiny", prompt=prompt)
    with pytest.raises(openai.BadRequestError, match="a stream has one prompt, not 2"):
        client.completions.create(model="tiny", prompt=["a", "b"], stream=True)


def test_models_and_names(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'") as error:
        client.chat.completions.create(model="gpt", messages=user("a"))
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings: not found"):
        client.embeddings.create(model="tiny", input="a")


def test_a_wrong_key_gets_401(server):
    address = server.removeprefix("http://").removesuffix("/v1")
    for header in ({}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": "Bearer schlüssel"}):
        connection = http.client.HTTPConnection(address)
        connection.request("GET", "/v1/models", headers=header)
        answer = connection.getresponse()
        error = json.load(answer)["error"]
        assert answer.status == 401 and error["code"] == "invalid_api_key"
        connection.close()
    with pytest.raises(openai.AuthenticationError, match="wrong or missing API key"):
        ask(openai.OpenAI(base_url=server, api_key="wrong", max_retries=0), "hi")


def test_sigterm_lets_a_running_answer_finish(checkpoint):
    process, url = start(checkpoint)
    client = openai.OpenAI(base_url=url, api_key="-", max_retries=0)  # any key: none was set
    stream = ask(client, "hi", stream=True, max_tokens=60)
    next(iter(stream))
    process.send_signal(signal.SIGTERM)
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "stopped\n")
    assert "+ 60 tokens" in err and "Traceback" not in err


def test_after_the_grace_the_rest_is_told(checkpoint):
    process, url = start(checkpoint, "--grace", "0", "--max_batch", "1")
    client = openai.OpenAI(base_url=url, api_key="-", max_retries=0)
    stream = ask(client, "hi", stream=True, **LONG)
    next(iter(stream))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        second = pool.submit(ask, client, "hi")  # waits for the only row
        wait_until(lambda: health(url)["waiting"] == 1)
        process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            second.result()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err


def test_what_is_refused_before_loading(checkpoint, monkeypatch):
    flags = ["--checkpoint", str(checkpoint)]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(InputError, match=f"cannot listen at 127.0.0.1 port {port}"):
            serve.main([*flags, "--port", port])
    with pytest.raises(InputError, match="--max_batch is 0; expected at least 1"):
        serve.main([*flags, "--max_batch", "0"])
    with pytest.raises(InputError, match="--max_context is 1;"):
        serve.main([*flags, "--max_context", "1"])
    monkeypatch.setattr(serve, "NEEDED", ("uvicorn", "no_such_library"))
    with pytest.raises(InputError, match=r"needs no_such_library.*pip install -e '\.\[serve\]'"):
        serve.main(flags)
