"""Training on bad input, and being stopped."""

import os
import shutil
import signal

import numpy as np
import pytest
from programs import make_home, replace, stopped

from qwen_jax.adapters import ADAPTER_WEIGHTS, Lora
from qwen_jax.cli import run
from qwen_jax.errors import InputError
from train import lora as program
from train.report import Report
from train.state import check_free, save_checkpoint
from train.step import TrainState


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


def training(home, output, *more):
    return [
        "--model_name_or_path", home / "ckpt", "--dataset", "sums", "--dataset_dir", home,
        "--output_dir", output, "--lora_rank", "2", "--max_steps", "3", "--cutoff_len", "64", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model_name_or_path", "{home}/hf"], "not a converted checkpoint"),
        (["--model_name_or_path", "Qwen/Qwen-72B"], "not a converted checkpoint"),
        (["--mesh", "tensor=3"], "tensor=3 must divide the 4 heads and 64 FFN columns"),
        (["--plan", "--mesh", "tensor=3"], "tensor=3 must divide the 4 heads"),
        (["--mesh", "64"], "needs 64 devices, this machine has 8"),
        (["--dataset", "sms"], "it has: sums; did you mean 'sums'?"),
        (["--dataset", "sums,nix"], "no dataset 'nix'"),
        (["--dataset", ","], "expected names"),
        (["--dataset_dir", "{home}/hf"], "no dataset_info.json"),
        (["--lora_target", "c_attn,attn.cproj"], "did you mean 'attn.c_proj'"),
        (["--lora_target", "q_proj"], "this model calls it 'c_attn'"),
        (["--remat", "half"], "unknown level 'half'"),
        (["--cutoff_len", "3"], "no answer within 3 tokens"),
        (["--resume_from_checkpoint", "true"], "not a complete checkpoint"),
        (["--output_dir", "{home}/sums.json"], "sums.json is not a folder"),
        (["--output_dir", "{home}/sums.json/x"], "sums.json is not a folder"),
    ],
)
def test_training_refuses_before_anything_is_made(home, tmp_path, flags, message, capsys):
    flags = [flag.format(home=home) for flag in flags]
    argv = training(home, tmp_path / "out", *flags)
    assert message in stopped(capsys, "train.lora", argv)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "0 rows read"),
        ("[]", "0 rows read"),
        ('[{"instruction": "a", "output": " "}]', "1 dropped (empty or missing answer)"),
        (
            '[{"instruction": "a", "output": "b"}, {"instruction": "a"}]',
            "row 2: no column 'output'",
        ),
        ('{"instruction": "a", "output": "b"}\n{"instruction": "a"}', "line 2: no column 'output'"),
        ('[{"instruction": 5, "output": "b"}]', "row 1: 'instruction' is int"),
        ("[null]", "row 1: expected an object with columns, got null"),
        ("[1]", "row 1: expected an object with columns, got int"),
        ('[{"instruction": "a"', "line 1: not JSON"),
        (b"\xff\xfe[]", "not UTF-8 at byte 0"),
        ('[{"instruction": "\\ud800", "output": "b"}]', "half a surrogate pair"),
    ],
)
def test_bad_rows_are_named(home, tmp_path, content, message, capsys):
    replace(tmp_path / "d.json", content)
    replace(tmp_path / "dataset_info.json", '{"sums": {"file_name": "d.json"}}')
    argv = training(home, tmp_path / "out", "--dataset_dir", tmp_path)
    assert message in stopped(capsys, "train.lora", argv)
    assert sorted(os.listdir(tmp_path)) == ["d.json", "dataset_info.json"]


def test_a_terminated_run_saves_its_state_and_says_so(home, tmp_path, monkeypatch, capfd):
    add = Report.add

    def stop_at_1(self, step, *rest):
        add(self, step, *rest)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Report, "add", stop_at_1)
    argv = [str(word) for word in training(home, tmp_path / "out", "--save_strategy", "no")]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        run(lambda: program.main(argv))
    said = capfd.readouterr()
    assert stop.value.code == 143
    assert "stopping after this step" in said.err
    assert f"to go on from {tmp_path / 'out' / 'checkpoint-1'}" in said.out
    assert os.listdir(tmp_path / "out") == ["checkpoint-1"]
    assert (tmp_path / "out" / "checkpoint-1" / ADAPTER_WEIGHTS).is_file()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_numbers_that_are_none_are_found_before_they_are_saved(tmp_path, name):
    report = Report(tmp_path, start=0, total=9, steps_per_epoch=9, every=9)
    good = {"loss": np.float32(1), "grad_norm": np.float32(1)}
    report.add(1, good, 5)
    report.check()
    report.add(2, good | {name: np.float32("inf")}, 5)
    with pytest.raises(InputError, match=r"no longer finite numbers .* up to step 2"):
        report.check()


def test_a_damaged_log_does_not_stop_a_resumed_run(tmp_path):
    log = tmp_path / "trainer_log.jsonl"
    log.write_bytes(b'{"step": 1}\n\xff\n{"step": "2"}\n[1]\n{"step": 3}\n{"st')
    Report(tmp_path, start=2, total=9, steps_per_epoch=9, every=9).close()
    assert log.read_text() == '{"step": 1}\n'


def test_a_full_disk_is_found_before_the_run_and_does_not_end_it(home, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    state = TrainState(step=np.int32(3), lora={"a": np.zeros(10**6, np.float32)}, opt_state=())
    with pytest.raises(InputError, match="has 0 MB free, a checkpoint needs 9 MB; free some"):
        check_free(tmp_path, state)
    report = Report(tmp_path, start=0, total=9, steps_per_epoch=9, every=9)
    with program.going_on(report, unless=False):
        save_checkpoint(tmp_path, state, {}, lambda folder, lora: None)
    with pytest.raises(InputError), program.going_on(report, unless=True):
        save_checkpoint(tmp_path, state, {}, lambda folder, lora: None)
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path):
    state = TrainState(step=np.int32(3), lora=Lora(weights={}, scale=1.0), opt_state=())

    def no_space(folder, lora):
        (folder / ADAPTER_WEIGHTS).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(folder))

    with pytest.raises(InputError, match=r"checkpoint-3 cannot be written: .* No space left"):
        save_checkpoint(tmp_path, state, {}, no_space)
    assert os.listdir(tmp_path) == []
