"""An adapter of ours, run by PEFT on transformers' Qwen2, gives the logits that we give.

The files that `save_peft` wrote are the only thing PEFT gets. Qwen2 has other module names, so its
copy of the adapter is renamed: c_attn is q, k and v, each with the one A and its third of B.
"""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from tiny import tiny_config, to_params
from torch_reference import qwen2_model, random_weights

from benchmarks.reference import QWEN2_MODULES, write_qwen2_adapter
from qwen_jax import model
from qwen_jax.adapters import LoraConfig, init_lora, save_peft

pytestmark = pytest.mark.optimized


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
    save_peft(saved, cfg, lora_cfg, lora, base_name="tiny", fingerprint="f" * 64)
    write_qwen2_adapter(saved, renamed)
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
        for ours, names in QWEN2_MODULES.items()
        for theirs in names
        if "all" in lora_cfg.targets
        or ours in lora_cfg.targets
        or ours.partition(".")[2] in lora_cfg.targets
    ]
    return {name.rpartition(".")[2] for name in chosen}
