"""What the tests of the programs share: small good folders, damage to them, and a failing run."""

import importlib
import json
import os
import shutil

import jax
import pytest

from convert import hf_to_flax
from demo.tiny_checkpoint import write_tiny_checkpoint
from qwen_jax.adapters import LoraConfig, init_lora, save_peft
from qwen_jax.cli import run
from qwen_jax.manifest import load_manifest


def make_home(folder):
    """hf: a Hugging Face folder; ckpt: the same converted; adapter; dataset_info.json and data."""
    write_tiny_checkpoint(folder / "hf", hidden_size=32, num_layers=2, kv_channels=8, ffn=64)
    hf_to_flax.convert(folder / "hf", folder / "ckpt", dtype="float32")
    manifest = load_manifest(folder / "ckpt")
    lora_cfg = LoraConfig(rank=2)
    save_peft(
        folder / "adapter",
        manifest.config,
        lora_cfg,
        init_lora(manifest.config, lora_cfg, jax.random.key(0)),
        base_name="tiny",
        fingerprint=manifest.fingerprint,
    )
    rows = [{"instruction": f"{i} + {i}?", "output": f"{2 * i}"} for i in range(6)]
    (folder / "sums.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text('{"sums": {"file_name": "sums.json"}}')
    return folder


def stopped(capsys, name, argv, code=1):
    """Runs a program that must fail; returns its one line of error."""
    with pytest.raises(SystemExit) as stop:
        run(lambda: importlib.import_module(name).main([str(word) for word in argv]))
    said = capsys.readouterr()
    assert stop.value.code == code, said
    assert "Traceback" not in said.out + said.err
    lines = [line for line in said.err.splitlines() if "error:" in line]
    assert len(lines) == 1, said.err
    return lines[0].partition("error: ")[2]


def copied(source, target):
    """A folder whose files share their bytes with `source`; one is replaced, never changed."""
    return shutil.copytree(source, target, copy_function=os.link)


def replace(path, content: bytes | str):
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def change_bytes(name, change_content):
    return lambda folder: replace(folder / name, change_content((folder / name).read_bytes()))
