"""Downloads from a local server that speaks the hub's API, drops connections and sends junk."""

import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hub_server import serve

from convert import download, hub
from qwen_jax.errors import InputError

REPO = "Qwen/Qwen-1_8B-Chat"
SHARD = "model-00001-of-00002.safetensors"
ROOT = pathlib.Path(__file__).parents[1]


def noise(size: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def model_files() -> dict[str, bytes]:
    return {
        "config.json": b'{"model_type": "qwen"}',
        "generation_config.json": b"{}",
        SHARD: noise(3_000_000, 0),
        "model-00002-of-00002.safetensors": noise(1_000_000, 1),
        "model.safetensors.index.json": b'{"weight_map": {}}',
        "qwen.tiktoken": noise(50_000, 2),
    }


NOT_WANTED = {
    "modeling_qwen.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "README.md": b"text",
    "../outside.json": b"{}",
    "folder/inner.json": b"{}",
    ".hidden.json": b"{}",
    "a\\b.json": b"{}",
}


@pytest.fixture
def server():
    with serve(model_files() | NOT_WANTED, REPO) as running:
        yield running


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(hub, "_LONGEST_WAIT", 0.01)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the library's own pauses
    monkeypatch.setenv("HF_TOKEN", "hf_secret")


def fetch(server, folder, **options) -> list[str]:
    return download.download(REPO, folder, endpoint=server.url, **options)


def assert_whole(folder: pathlib.Path) -> None:
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found.pop(download.RECORD_NAME)
    assert found == model_files()
    assert not [path for path in folder.parent.iterdir() if path != folder]


def test_takes_weights_json_and_tokenizer_and_nothing_else(server, tmp_path):
    output = tmp_path / "out"
    assert sorted(fetch(server, output)) == sorted(model_files())
    assert_whole(output)
    asked = {file for _, file, _ in server.requests}
    assert asked == {"api", *model_files()}
    assert set(server.tokens) == {None}, "the token of the hub went to a mirror"


def test_a_complete_folder_is_recognized(server, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    fetch(server, output)
    server.requests.clear()
    monkeypatch.setattr(hub, "_hash", None)  # the record spares reading 145 GB again
    assert fetch(server, output) == []
    assert [file for _, file, _ in server.requests] == ["api"]
    assert "all as published" in capsys.readouterr().out
    monkeypatch.undo()
    (output / download.RECORD_NAME).unlink()
    assert fetch(server, output) == []
    assert_whole(output)


def test_a_changed_file_is_fetched_again(server, tmp_path):
    output = tmp_path / "out"
    fetch(server, output)
    for name in (SHARD, "config.json"):  # the same size, another content
        path = output / name
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert sorted(fetch(server, output)) == sorted([SHARD, "config.json"])
    assert_whole(output)


@pytest.mark.parametrize(
    "faults",
    [
        ["drop"] * 3,
        ["short"] * 3,
        ["503", "500", "429", "502"],
        ["drop", "503", "short", "whole"],
        ["long"],
        ["wrong"],
        ["wrong", "drop", "wrong"],
    ],
    ids="-".join,
)
@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_bad_links(server, tmp_path, faults, name):
    output = tmp_path / "out"
    server.faults[name] = list(faults)
    server.faults["api"] = ["503", "429"]
    fetch(server, output, workers=2)
    assert_whole(output)
    assert not server.faults[name] and not server.faults["api"]


def test_a_dropped_connection_goes_on_where_it_was(server, tmp_path):
    server.faults[SHARD] = ["drop", "short"]
    fetch(server, tmp_path / "out", workers=1)
    assert server.gets(SHARD) == [None, "bytes=1500000-", "bytes=2250000-"]


def test_a_later_run_goes_on_with_what_is_there(server, tmp_path):
    output = tmp_path / "out"
    server.faults[SHARD] = ["drop", *["503"] * 50]
    with pytest.raises(InputError, match=r"attempts in a row .* is kept: run the same command"):
        fetch(server, output, retries=2, workers=1)
    assert not (output / SHARD).exists()
    (partial,) = output.glob(f".{SHARD}.*.partial")
    assert partial.read_bytes() == model_files()[SHARD][:1_500_000]
    server.faults.clear()
    server.requests.clear()
    fetch(server, output)
    assert server.gets(SHARD) == ["bytes=1500000-"]
    assert_whole(output)


def test_the_beginning_of_another_content_is_not_gone_on_with(server, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    stray = output / f".{SHARD}.0123456789ab.partial"
    stray.write_bytes(b"old")
    fetch(server, output)
    assert_whole(output)


@pytest.mark.parametrize("fault, message", [("wrong", "another hash"), ("long", "attempts in a")])
def test_a_mirror_that_keeps_sending_junk_is_given_up(server, tmp_path, fault, message):
    server.faults[SHARD] = [fault] * 50
    with pytest.raises(InputError, match=message):
        fetch(server, tmp_path / "out", retries=3)
    assert not (tmp_path / "out" / SHARD).exists()


def test_a_mirror_without_sizes_is_asked_for_each(server, tmp_path):
    server.with_sizes = False
    server.faults[SHARD] = ["drop", "wrong"]
    fetch(server, tmp_path / "out")
    assert_whole(tmp_path / "out")


@pytest.mark.parametrize("status", ["403", "404", "410"])
def test_what_another_attempt_cannot_change_fails_at_once(server, tmp_path, status):
    server.faults[SHARD] = [status]
    with pytest.raises(InputError, match=f"{SHARD}: .* refuses it"):
        fetch(server, tmp_path / "out")
    assert len(server.gets(SHARD)) == 1


def test_an_unknown_repository(server, tmp_path):
    with pytest.raises(InputError, match="has no repository me/other"):
        download.download("me/other", tmp_path / "out", endpoint=server.url)


def test_a_server_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"list of files .* attempts in a row"):
        download.download(REPO, tmp_path / "out", endpoint="http://127.0.0.1:9", retries=1)


def test_only_pickled_weights(tmp_path):
    files = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    with serve(files, REPO) as server, pytest.raises(InputError, match="only pickled"):
        fetch(server, tmp_path / "out")


def test_a_full_disk_is_told_before_anything_is_fetched(server, tmp_path, monkeypatch):
    monkeypatch.setattr(
        download.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})
    )
    with pytest.raises(InputError, match="has 1000 bytes free, 40"):
        fetch(server, tmp_path / "out")
    assert not server.gets(SHARD)


def test_killed_and_run_again(tmp_path):
    files = model_files() | {SHARD: noise(60_000_000, 3)}
    with serve(files, REPO) as server:
        server.faults[SHARD] = ["drop", *["503"] * 1000]
        command = [
            *(sys.executable, "-m", "convert.download", "--repo_id", "1.8b-chat"),
            *("--output", str(tmp_path / "out"), "--endpoint", server.url, "--workers", "1"),
        ]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        partial = pathlib.Path("missing")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (
            partial.exists() and partial.stat().st_size >= 30_000_000
        ):
            partial = next((tmp_path / "out").glob(f".{SHARD}.*"), partial)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        server.faults.clear()
        server.requests.clear()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert server.gets(SHARD) == ["bytes=30000000-"]
        assert (tmp_path / "out" / SHARD).read_bytes() == files[SHARD]


@pytest.mark.parametrize(
    "name, full",
    [
        ("72b-chat", "Qwen/Qwen-72B-Chat"),
        ("qwen-7b-chat-int4", "Qwen/Qwen-7B-Chat-Int4"),
        ("Qwen-1.8B", "Qwen/Qwen-1_8B"),
        ("1_8b-chat-int8", "Qwen/Qwen-1_8B-Chat-Int8"),
        ("qwen/qwen-14b", "Qwen/Qwen-14B"),
        ("someone/Qwen-14B-tuned", "someone/Qwen-14B-tuned"),
    ],
)
def test_short_names(name, full):
    assert download.resolve_name(name) == full


@pytest.mark.parametrize(
    "name, message",
    [
        ("72b-caht", "did you mean 'Qwen/Qwen-72B-Chat'"),
        ("Qwen/Qwen2-7B", "is no original Qwen"),
        ("", "is no original Qwen"),
        ("a/../b", "expected OWNER/NAME"),
    ],
)
def test_wrong_names_get_the_nearest(name, message):
    with pytest.raises(InputError, match=message):
        download.resolve_name(name)


def test_sixteen_names_are_known():
    assert len(set(download.KNOWN)) == 16
