"""Two processes with a device each, joined by jax.distributed, against one process with two."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy
from programs import make_home

from qwen_jax import processes
from qwen_jax.errors import InputError, UsageError
from train import lora as program


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


def flags(home, output, *more):
    return [
        "--model_name_or_path", str(home / "ckpt"), "--dataset", "sums",
        "--dataset_dir", str(home), "--output_dir", str(output), "--lora_rank", "2",
        "--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--logging_steps", "1",
        "--cutoff_len", "64", "--quantization_bit", "8", "--mesh", "fsdp=2",
        "--offload_embedding", *more,
    ]  # fmt: skip


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start_two(argv, *own, programs=(["-m", "train.lora"],) * 2):
    """Both processes of a run; own[i] are flags of process i alone."""
    address = f"localhost:{free_port()}"
    joining = ["--coordinator", address, "--num_processes", "2", "--process_id"]
    return [
        subprocess.Popen(
            [sys.executable, *programs[i], *argv, *joining, str(i), *(own[i] if own else ())],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        )
        for i in range(2)
    ]


def ended(two):
    """(exit code, stdout, stderr) of each."""
    return [(p.returncode, out, err) for p in two for out, err in [p.communicate(timeout=300)]]


def wait_for_steps(output, count, two):
    log = output / "trainer_log.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= count):
        assert all(p.poll() is None for p in two), ended(two)
        time.sleep(0.05)


def losses(folder):
    rows = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def adapter(folder):
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def assert_same_run(one, other):
    # The programs are the same; what may differ is the order in which collectives add, an ulp of
    # float32 (6e-8) here and there. AdamW makes of it more where a gradient is nearly zero.
    np.testing.assert_allclose(losses(one), losses(other), rtol=1e-5)
    ours, theirs = adapter(one), adapter(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=2e-4, err_msg=name)
        assert np.abs(ours[name]).max() > 0.01, name  # 0.01 a step: b has moved from zero


def test_two_processes_train_as_one_with_both_devices(home, tmp_path):
    more = ("--max_steps", "4")
    two = start_two(flags(home, tmp_path / "two", *more))
    program.main(flags(home, tmp_path / "one", *more))
    (code, out, err), (other_code, other_out, other_err) = ended(two)
    assert (code, other_code) == (0, 0), err + other_err
    assert "adapter saved in" in out and other_out.replace("[Gloo]", "").count("\n") <= 1
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(
        p.name for p in (tmp_path / "one").iterdir()
    )


@pytest.mark.slow
def test_interrupted_and_resumed_by_two_processes(home, tmp_path):
    more = ("--max_steps", "40", "--save_strategy", "no")
    program.main(flags(home, tmp_path / "one", *more))
    two = start_two(flags(home, tmp_path / "two", *more))
    wait_for_steps(tmp_path / "two", 3, two)
    two[1].send_signal(signal.SIGTERM)  # not the one that writes: it must learn of it
    stopped = ended(two)
    assert [code for code, _, _ in stopped] == [143, 143], stopped
    (checkpoint,) = (tmp_path / "two").glob("checkpoint-*")
    assert "stopped after step" in stopped[0][1]
    again = ended(start_two(flags(home, tmp_path / "two", *more)))
    assert [code for code, _, _ in again] == [0, 0], again
    assert f"resuming from {checkpoint}" in again[0][1]
    assert_same_run(tmp_path / "two", tmp_path / "one")
    # What two processes saved, one goes on with: on disk is the state of the whole mesh.
    shutil.copytree(checkpoint, tmp_path / "three" / checkpoint.name)
    shutil.copy(tmp_path / "two" / "trainer_log.jsonl", tmp_path / "three")
    program.main(flags(home, tmp_path / "three", *more))
    assert_same_run(tmp_path / "three", tmp_path / "one")


@pytest.mark.slow
def test_a_dead_peer_is_one_line(home, tmp_path):
    two = start_two(flags(home, tmp_path / "out", "--max_steps", "100000"))
    wait_for_steps(tmp_path / "out", 3, two)
    two[1].kill()
    (code, _, err), _ = ended(two)
    assert code == 1 and "exchange with the other processes failed" in err, err
    assert "Traceback" not in err, err


# What process 1 runs instead of the module: its disk is full.
FULL = """
import sys
import orbax.checkpoint as ocp
from qwen_jax.cli import run
from train import lora

def save(*args, **kwargs):
    raise OSError(28, "No space left on device")

ocp.StandardCheckpointer.save = save
run(lambda: lora.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_checkpoint_that_one_cannot_write_ends_both(home, tmp_path):
    argv = flags(home, tmp_path / "out", "--max_steps", "50", "--save_steps", "2")
    both = ended(start_two(argv, programs=(["-m", "train.lora"], ["-c", FULL])))
    for code, _, err in both:
        assert code == 1 and "Traceback" not in err, err
    assert "No space left on device" in both[1][2]
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.slow
def test_processes_with_different_flags_are_refused(home, tmp_path):
    """Also with one that decides no number, but when the processes meet."""
    both = ended(start_two(flags(home, tmp_path / "out"), (), ("--save_steps", "7")))
    for code, _, err in both:
        assert code == 1 and "the flags of process 1 differ" in err, err
    assert not (tmp_path / "out" / "trainer_log.jsonl").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((None, 2, 0), "need --coordinator"),
        (("localhost", 2, 0), "expected HOST:PORT"),
        (("localhost:99999", 2, 0), "expected HOST:PORT"),
        (("localhost:1234", 2, None), "needs --num_processes and --process_id"),
        (("localhost:1234", 2, 2), "--process_id 2: expected 0 to 1"),
        (("localhost:1234", 2, 0, "0,x"), "--local_devices '0,x'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    with pytest.raises(UsageError, match=message), processes.joined(*arguments):
        pass


def test_one_process_needs_nothing():
    with processes.joined(None):
        assert processes.first() and not processes.several()
        processes.check_same("anything", [1])
        assert processes.most(3) == 3 and processes.Agreed().update(15) == 15

        def fail():
            raise InputError("no room")

        with pytest.raises(InputError, match="no room"):
            processes.by_first("looking for room", fail)
