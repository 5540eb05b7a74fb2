"""A conversion that is killed, at any point: the next run goes on, to the same bytes.

The runs are processes of their own, killed for real; a fork server imports jax once for all.
"""

import multiprocessing
import os
import pathlib
import random
import signal
import time

import pytest

from convert import hf_to_flax
from qwen_jax import checkpoint_writer, files, staging
from qwen_jax.errors import InputError
from qwen_jax.journal import Journal
from qwen_jax.staging import StagedFolder
from tests.conversions import NF4, assert_finished, contents, write_source

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.test_resume"])


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def whole(hf, tmp_path_factory):
    """What an uninterrupted run gives."""
    output = tmp_path_factory.mktemp("whole") / "ck"
    hf_to_flax.convert(hf, output, fmt=NF4)
    return contents(output)


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


def inside_the_manifest():
    def replace(source, target):
        if pathlib.Path(target).name == "manifest.json":
            die()
        original(source, target)

    original, files.os.replace = files.os.replace, replace


def before_the_rename():
    dying_at(StagedFolder, "commit", 0, before=True)


def dying_after_rename_to(name: str) -> None:
    def rename(source, target):
        original(source, target)
        if pathlib.Path(target).name == name:
            die()

    original, staging.os.rename = staging.os.rename, rename


def after_the_rename():
    dying_after_rename_to("ck")


POINTS = [
    before_the_arrays,
    after_the_arrays,
    before_the_first_record,
    cut_off_a_line,
    after_some_records,
    before_the_manifest,
    inside_the_manifest,
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
    assert output.exists() == (call == 0)
    hf_to_flax.convert(hf, output, fmt=NF4, overwrite=True)
    assert_finished(output, whole)


def between_the_renames():
    dying_after_rename_to("replaced")


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
