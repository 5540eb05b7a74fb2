"""Conversions that stop or are refused: no work is lost, none is mixed up, and all is said."""

import contextlib
import json
import pathlib
import resource
import signal
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import flax_to_hf, hf_to_flax
from demo.tiny_checkpoint import write_tiny_checkpoint
from qwen_jax import checkpoint_writer, journal, staging
from qwen_jax.checkpoint import load_params
from qwen_jax.checkpoint_writer import CheckpointWriter
from qwen_jax.errors import InputError
from qwen_jax.quant import QuantFormat
from tests.conversions import NF4, assert_finished, contents, interrupt_after, write_source


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def whole(hf, tmp_path_factory):
    """What an uninterrupted run gives."""
    output = tmp_path_factory.mktemp("whole") / "ck"
    hf_to_flax.convert(hf, output, fmt=NF4)
    return contents(output)


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
    other = write_source(tmp_path / "hf", seed=1)
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


def test_export_over_what_a_killed_export_left(hf, tmp_path):
    hf_to_flax.convert(hf, tmp_path / "ck")
    left = tmp_path / ".out.partial/out"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    (left / ".model.safetensors.partial").touch()
    flax_to_hf.export(tmp_path / "ck", tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(InputError, match="already exists"):
        flax_to_hf.export(tmp_path / "ck", tmp_path / "out")
