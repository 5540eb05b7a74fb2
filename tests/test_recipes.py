"""The commands of docs/recipes.md, run as they stand there, on a small stand-in for the hub."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import jax
import pytest
from gptq_folder import write_gptq_checkpoint
from hub_server import serve

from demo.tiny_checkpoint import write_tiny_checkpoint
from qwen_jax.adapters import LoraConfig, init_lora, save_peft
from qwen_jax.config import load_hf_config

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()
]
SIZES = dict(hidden_size=128, kv_channels=32, ffn=128, num_layers=1, vocab_size=151936)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A folder to work in with `my-adapter`, and a hub with the two repositories."""
    place = tmp_path_factory.mktemp("recipes")
    write_gptq_checkpoint(place / "hub" / "int4", 4, tokenizer=True, **SIZES)
    write_tiny_checkpoint(place / "hub" / "bf16", **SIZES)
    cfg, lora_cfg = load_hf_config(place / "hub" / "bf16"), LoraConfig(rank=2)
    lora = init_lora(cfg, lora_cfg, jax.random.key(0))
    lora = jax.tree.map(lambda x: x + 0.01, lora)
    work = place / "work"
    shutil.copytree(ROOT / "demo" / "data", work / "data")
    save_peft(work / "my-adapter", cfg, lora_cfg, lora, base_name="x", fingerprint="")
    files = {
        kind: {path.name: path.read_bytes() for path in (place / "hub" / kind).iterdir()}
        for kind in ("int4", "bf16")
    }
    with serve(files["int4"], "Qwen/Qwen-72B-Chat-Int4") as hub:
        hub.others["Qwen/Qwen-72B-Chat"] = files["bf16"]
        yield work, hub


@pytest.mark.slow
def test_commands_run_as_written(stand_in):
    work, hub = stand_in
    assert len(COMMANDS) == 8
    env = os.environ | {"HF_ENDPOINT": hub.url, "PYTHONPATH": str(ROOT)}
    output = []
    for command in COMMANDS:
        words = shlex.split(command)
        assert words[0] == "python"
        done = subprocess.run(
            [sys.executable, *words[1:]], cwd=work, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        output.append(done.stdout)
    assert "all as published" in output[1] and "fetched" not in output[1]
    for text in (output[4], output[6]):
        assert "merged against the adapter in use on qwen-72b-int4: KL mean" in text
    assert (work / "merged" / "model.safetensors").exists()
    (line,) = (line for line in output[7].splitlines() if line.startswith("packed: "))
    assert line in TEXT
