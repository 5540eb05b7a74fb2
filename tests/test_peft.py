"""An adapter of ours, run by PEFT on transformers' Qwen2, gives the logits that we give.

The files that `save_peft` wrote are the only thing PEFT gets. Qwen2 has other module names, so its
copy of the adapter is renamed: c_attn is q, k and v, each with the one A and its third of B.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from tiny import tiny_config, to_params
from torch_reference import qwen2_model, random_weights

from qwen_jax import model
from qwen_jax.adapters import LoraConfig, init_lora, save_peft

FINGERPRINT = "f" * 64
NAMES = {
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "mlp.w1": ("mlp.up_proj",),
    "mlp.w2": ("mlp.gate_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}


def to_qwen2_adapter(source, target):
    """Copies a PEFT folder for Qwen v1 into one for Qwen2; every tensor must find its place."""
    tensors = safetensors.numpy.load_file(source / "adapter_model.safetensors")
    renamed, modules = {}, set()
    for name, tensor in tensors.items():
        prefix, layer, module, side = parse_name(name)
        names = NAMES[module]
        parts = np.split(tensor, len(names)) if side == "lora_B" else [tensor] * len(names)
        for theirs, part in zip(names, parts, strict=True):
            key = f"{prefix}.model.layers.{layer}.{theirs}.{side}.weight"
            renamed[key] = np.ascontiguousarray(part)
            modules.add(theirs.rpartition(".")[2])
    config = json.loads((source / "adapter_config.json").read_text())
    config["target_modules"] = sorted(modules)
    target.mkdir()
    (target / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(renamed, target / "adapter_model.safetensors", {"format": "pt"})


def parse_name(name):
    """base_model.model.transformer.h.3.mlp.w1.lora_A.weight -> its prefix, 3, mlp.w1, lora_A."""
    prefix, _, rest = name.partition(".transformer.h.")
    layer, _, rest = rest.partition(".")
    module, side, kind = rest.rsplit(".", 2)
    assert (prefix, kind) == ("base_model.model", "weight")
    return prefix, layer, module, side


@pytest.mark.parametrize(
    "lora_cfg",
    [
        LoraConfig(rank=4, alpha=12.0),
        LoraConfig(rank=3, targets=("c_attn", "w2"), use_rslora=True),
        LoraConfig(rank=8, alpha=5.0, targets=("attn.c_proj", "w1", "mlp.c_proj")),
    ],
    ids=["all targets", "rslora on two", "the other three"],
)
def test_peft_on_qwen2_gives_the_logits_of_our_adapter(lora_cfg, tmp_path):
    cfg = tiny_config()
    weights = random_weights(cfg)
    params = to_params(cfg, weights)
    rng = np.random.default_rng(3)
    lora = jax.tree.map(  # as training leaves it: b is no longer zero
        lambda x: x + jnp.asarray(0.05 * rng.standard_normal(x.shape), jnp.float32),
        init_lora(cfg, lora_cfg, jax.random.key(3)),
    )
    ids = rng.integers(0, cfg.vocab_size, (2, 500)).astype(np.int32)
    ours = np.asarray(model.logits(cfg, params, lora, ids))

    saved, renamed = tmp_path / "saved", tmp_path / "renamed"
    save_peft(saved, cfg, lora_cfg, lora, base_name="tiny", fingerprint=FINGERPRINT)
    to_qwen2_adapter(saved, renamed)
    base = qwen2_model(cfg, weights)
    with torch.no_grad():
        before = base(torch.tensor(ids).long()).logits.numpy()
        wrapped = peft.PeftModel.from_pretrained(base, str(renamed))
        assert wrapped.peft_config["default"].target_modules == target_modules(lora_cfg)
        theirs = wrapped(torch.tensor(ids).long()).logits.numpy()
    assert np.abs(theirs - before).max() > 0.1  # the adapter does something
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def target_modules(lora_cfg):
    """The last names of the Qwen2 modules that a config of ours trains."""
    chosen = [
        theirs
        for ours, names in NAMES.items()
        for theirs in names
        if "all" in lora_cfg.targets
        or ours in lora_cfg.targets
        or ours.partition(".")[2] in lora_cfg.targets
    ]
    return {name.rpartition(".")[2] for name in chosen}
