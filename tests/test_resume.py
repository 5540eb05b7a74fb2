"""A conversion that is killed, refused or out of disk: the next run goes on, to the same bytes.

The runs are processes of their own, killed for real; a fork server imports jax once for all.
"""

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import resource
import signal
import time
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import hf_to_flax
from convert.hf_files import HfWeights
from demo.tiny_checkpoint import write_tiny_checkpoint
from qwen_jax import checkpoint_writer, journal, staging
from qwen_jax.checkpoint import load_params
from qwen_jax.checkpoint_writer import CheckpointWriter
from qwen_jax.errors import InputError
from qwen_jax.journal import Journal
from qwen_jax.quant import QuantFormat
from qwen_jax.staging import StagedFolder

NF4 = QuantFormat.named("nf4")
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.test_resume"])


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    sizes = dict(hidden_size=256, kv_channels=64, ffn=512, vocab_size=216, num_layers=12)
    return write_tiny_checkpoint(folder, tokenizer=False, **sizes)


@pytest.fixture(scope="module")
def whole(hf, tmp_path_factory):
    """What an uninterrupted run gives."""
    output = tmp_path_factory.mktemp("whole") / "ck"
    hf_to_flax.convert(hf, output, fmt=NF4)
    return contents(output)


def contents(folder: pathlib.Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_finished(output: pathlib.Path, whole: dict[str, str]) -> None:
    assert contents(output) == whole
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def converting(source, output, prepare=None, overwrite=False) -> None:
    """The body of a process."""
    if prepare is not None:
        prepare()
    hf_to_flax.convert(source, output, fmt=NF4, overwrite=overwrite)


def run(*args, kill_after: float | None = None) -> int:
    process = processes.Process(target=converting, args=args)
    process.start()
    process.join(kill_after)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def dying_at(owner, name: str, call: int, *, before: bool) -> None:
    """Replaces a function by one that kills the process at its call number `call`."""
    original, calls = getattr(owner, name), iter(range(10**9))

    def replaced(*args, **kwargs):
        last = next(calls) == call
        if last and before:
            die()
        result = original(*args, **kwargs)
        if last:
            die()
        return result

    setattr(owner, name, replaced)


def cut_off_a_line() -> None:
    def add(self, part, key, files):
        if len(self.parts) == 7:
            with open(self.path, "a") as file:
                file.write('{"part": "layers.mlp')
            die()
        original(self, part, key, files)

    original, Journal.add = Journal.add, add


def before_the_arrays():
    dying_at(checkpoint_writer, "make_empty_arrays", 0, before=True)


def after_the_arrays():
    dying_at(checkpoint_writer, "make_empty_arrays", 0, before=False)


def before_the_first_record():
    dying_at(Journal, "add", 0, before=True)


def after_some_records():
    dying_at(Journal, "add", 20, before=False)


def before_the_manifest():
    dying_at(checkpoint_writer, "write_json", 0, before=True)


def before_the_rename():
    dying_at(staging.os, "rename", 0, before=True)


def after_the_rename():
    dying_at(staging, "sync_folder", 0, before=True)


POINTS = [
    before_the_arrays,
    after_the_arrays,
    before_the_first_record,
    cut_off_a_line,
    after_some_records,
    before_the_manifest,
    before_the_rename,
    after_the_rename,
]


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_the_delicate_points(hf, whole, tmp_path, point):
    output = tmp_path / "ck"
    assert run(hf, output, point) == -signal.SIGKILL
    assert output.exists() == (point is after_the_rename)
    hf_to_flax.convert(hf, output, fmt=NF4)
    assert_finished(output, whole)


@pytest.mark.parametrize("call", [0, 1])
def test_killed_while_an_old_checkpoint_is_replaced(hf, whole, tmp_path, call):
    output = tmp_path / "ck"
    hf_to_flax.convert(hf, output)
    prepare = [before_the_rename, between_the_renames][call]
    assert run(hf, output, prepare, True) == -signal.SIGKILL
    hf_to_flax.convert(hf, output, fmt=NF4, overwrite=True)
    assert_finished(output, whole)


def between_the_renames():
    dying_at(staging.os, "rename", 0, before=False)


@pytest.mark.parametrize(
    "kills", [pytest.param(3, id="3"), pytest.param(20, id="20", marks=pytest.mark.slow)]
)
def test_killed_at_random_points(hf, whole, tmp_path, kills):
    output, rng = tmp_path / "ck", random.Random(kills)
    begin = time.perf_counter()
    assert run(hf, tmp_path / "timed") == 0
    seconds = time.perf_counter() - begin
    for path in (tmp_path / "timed").rglob("*"):
        if path.is_file():
            path.unlink()
    killed = 0
    while killed < kills:
        killed += run(hf, output, kill_after=rng.uniform(0, seconds)) == -signal.SIGKILL
        if output.exists():
            assert contents(output) == whole
            if killed < kills:
                checkpoint_writer.shutil.rmtree(output)
    if not output.exists():
        assert run(hf, output) == 0
    checkpoint_writer.shutil.rmtree(tmp_path / "timed")
    if (tmp_path / ".ck.partial").exists():  # killed after the rename
        hf_to_flax.convert(hf, output, fmt=NF4)
    assert_finished(output, whole)


def interrupt_after(count: int, error: type[BaseException]):
    """A patch under which the read number `count` fails."""
    original, calls = HfWeights.read, iter(range(10**9))

    def read(self, name, rows=None, out=None):
        if out is not None and next(calls) == count:
            raise error(errno.EIO, f"{name}: bad sector")
        return original(self, name, rows, out)

    return mock.patch.object(HfWeights, "read", read)


@pytest.mark.parametrize("error", [InputError, KeyboardInterrupt])
def test_stopped_runs_say_that_they_can_go_on(hf, whole, tmp_path, capsys, error):
    output = tmp_path / "ck"
    with interrupt_after(30, error), pytest.raises(error) as caught:
        hf_to_flax.convert(hf, output, fmt=NF4)
    assert not output.exists()
    said = str(caught.value) + capsys.readouterr().err
    assert "parts are kept in" in said and "run the command again" in said
    hf_to_flax.convert(hf, output, fmt=NF4)
    assert "going on" in capsys.readouterr().out
    assert_finished(output, whole)


def test_resumed_run_reads_only_what_is_missing(hf, tmp_path):
    with interrupt_after(40, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        hf_to_flax.convert(hf, tmp_path / "ck", fmt=NF4)
    done = len((tmp_path / ".ck.partial/journal.jsonl").read_text().splitlines()) - 1
    original = CheckpointWriter.write
    with mock.patch.object(CheckpointWriter, "write", autospec=True, side_effect=original) as write:
        hf_to_flax.convert(hf, tmp_path / "ck", fmt=NF4)
    assert done > 10 and write.call_count == 8 * 12 + 3 - done


def test_full_disk(hf, whole, tmp_path):
    """No file may grow beyond 40 kB: some weights fit, the larger ones do not."""
    output = tmp_path / "ck"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, old[1]))
    try:
        with pytest.raises(InputError, match=r"cannot be written: .*parts are kept in") as caught:
            hf_to_flax.convert(hf, output, fmt=NF4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
    hf_to_flax.convert(hf, output, fmt=NF4)
    assert_finished(output, whole)


def test_too_small_a_disk_is_refused_before_work(hf, tmp_path):
    usage = mock.Mock(return_value=mock.Mock(free=1000))
    with (
        mock.patch.object(staging.shutil, "disk_usage", usage),
        pytest.raises(InputError, match="1000 bytes free"),
    ):
        hf_to_flax.convert(hf, tmp_path / "ck")
    assert not list(tmp_path.iterdir())


def stop_early(source, output, **options) -> None:
    with (
        interrupt_after(30, KeyboardInterrupt),
        contextlib.suppress(KeyboardInterrupt),
    ):
        hf_to_flax.convert(source, output, **options)
    assert not output.exists()


def test_unfinished_work_of_other_arguments_is_refused(hf, whole, tmp_path):
    output = tmp_path / "ck"
    stop_early(hf, output, fmt=QuantFormat.named("int8"))
    with pytest.raises(InputError, match=r"quantization int8 \(now nf4\).*--overwrite"):
        hf_to_flax.convert(hf, output, fmt=NF4)
    stop_early(hf, output, fmt=QuantFormat.named("int8"))  # the refusal has cost it nothing
    assert len((tmp_path / ".ck.partial/journal.jsonl").read_text().splitlines()) > 40
    hf_to_flax.convert(hf, output, fmt=NF4, overwrite=True)
    assert_finished(output, whole)


def test_tensors_of_another_source_are_made_again(hf, whole, tmp_path, capsys):
    """Same sizes, other numbers: what the first source gave must not end up in the result."""
    other = write_tiny_checkpoint(
        tmp_path / "hf",
        seed=1,
        hidden_size=256,
        kv_channels=64,
        ffn=512,
        vocab_size=216,
        num_layers=12,
        tokenizer=False,
    )
    stop_early(other, tmp_path / "out/ck", fmt=NF4)
    hf_to_flax.convert(hf, tmp_path / "out/ck", fmt=NF4)
    assert "going on" not in capsys.readouterr().out
    assert_finished(tmp_path / "out/ck", whole)


def test_one_shard_downloaded_again(tmp_path):
    """Only the tensors of the new file are made again."""
    source = write_tiny_checkpoint(
        tmp_path / "hf", vocab_size=64, num_layers=2, shards=2, tokenizer=False
    )
    last = sorted(source.glob("*.safetensors"))[-1]
    good = load_file(last)
    bad = {name: tensor.copy() for name, tensor in good.items()}
    bad["lm_head.weight"][-1] = np.nan
    save_file(bad, last)
    with pytest.raises(InputError, match="has nan"):
        hf_to_flax.convert(source, tmp_path / "ck")
    save_file(good, last)
    written = []
    original = CheckpointWriter.write

    def write(self, spec, index, arrays, key=""):
        written.append(spec.torch_names()[index if spec.stacked else 0])
        return original(self, spec, index, arrays, key)

    with mock.patch.object(CheckpointWriter, "write", write):
        hf_to_flax.convert(source, tmp_path / "ck")
    assert set(written) == set(good)
    load_params(tmp_path / "ck")


def chunk_files(work: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in sorted(work.rglob("*/c/**/*")) if path.is_file()]


def test_damaged_work_is_made_again(hf, whole, tmp_path):
    """Lost and short files are seen; flipped bytes are looked for after a restart."""
    output = tmp_path / "ck"
    stop_early(hf, output, fmt=NF4)
    files = chunk_files(tmp_path / ".ck.partial")
    files[0].unlink()
    files[2].write_bytes(files[2].read_bytes()[:-3])
    data = bytearray(files[5].read_bytes())
    data[10] ^= 1
    files[5].write_bytes(data)
    with (
        mock.patch.object(checkpoint_writer, "boot_id", lambda: "later"),
        mock.patch.object(journal, "boot_id", lambda: "later"),
    ):
        hf_to_flax.convert(hf, output, fmt=NF4)
    assert_finished(output, whole)


def test_damaged_journal(hf, tmp_path):
    stop_early(hf, tmp_path / "ck")
    (tmp_path / ".ck.partial/journal.jsonl").write_text("[]\n{}\n")
    with pytest.raises(InputError, match="remove the folder"):
        hf_to_flax.convert(hf, tmp_path / "ck")


def hold_the_lock(output, ready) -> None:
    with StagedFolder(output, "mark", overwrite=False):
        ready.set()
        time.sleep(60)


def test_two_conversions_to_one_output(hf, whole, tmp_path):
    output, ready = tmp_path / "ck", processes.Event()
    holder = processes.Process(target=hold_the_lock, args=(output, ready))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(InputError, match="another process"):
        hf_to_flax.convert(hf, output, fmt=NF4)
    holder.kill()  # its lock dies with it
    holder.join()
    hf_to_flax.convert(hf, output, fmt=NF4)
    assert_finished(output, whole)


def test_incomplete_work_does_not_load(hf, tmp_path):
    stop_early(hf, tmp_path / "ck")
    for path in (tmp_path / ".ck.partial", tmp_path / ".ck.partial/ck"):
        with pytest.raises(InputError, match=r"no manifest\.json"):
            load_params(path)


def test_manifest_without_its_files_does_not_load(hf, tmp_path):
    manifest = hf_to_flax.convert(hf, tmp_path / "ck").to_dict()
    assert json.loads((tmp_path / "ck/manifest.json").read_text()) == manifest
    next(path for path in chunk_files(tmp_path / "ck") if "mlp.up" in str(path)).unlink()
    with pytest.raises(InputError, match=r"is damaged: .*mlp\.up"):
        load_params(tmp_path / "ck")
