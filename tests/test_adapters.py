"""LoRA files against PEFT itself, and the target counts from the table."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from tiny import tiny_config, to_params
from torch_reference import random_weights

from qwen_jax import model
from qwen_jax.adapters import (
    LoraConfig,
    count_trainable,
    describe_trainable,
    init_lora,
    load_peft,
    merged_weight,
    save_peft,
)
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
TARGETS = ("c_attn", "attn.c_proj", "w1", "w2", "mlp.c_proj")


def trained_lora(cfg, lora_cfg, seed=0):
    """An adapter whose b is not zero."""
    lora = init_lora(cfg, lora_cfg, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + 0.05 * jnp.asarray(rng.standard_normal(x.shape), jnp.float32), lora
    )


@pytest.mark.parametrize(
    "targets, count", [(("c_attn", "w1", "w2"), 62_914_560), (("all",), 94_371_840)]
)
def test_published_trainable_counts_of_72b(targets, count):
    cfg = ModelConfig.from_hf(json.loads((CONFIGS / "qwen_72b.json").read_text()))
    lora_cfg = LoraConfig(rank=8, targets=targets)
    counts = count_trainable(cfg, lora_cfg)
    assert sum(c.trainable for c in counts) == count
    assert all(c.layers == 80 for c in counts)
    assert f"{count:,}" in describe_trainable(cfg, lora_cfg)


@pytest.mark.parametrize(
    "name, hint",
    [("attn.cproj", "attn.c_proj"), ("mlp.cproj", "mlp.c_proj"), ("c_proj", "both"), ("w3", "w")],
)
def test_a_target_that_matches_nothing_is_an_error(name, hint):
    with pytest.raises(InputError, match=f"{name}.*{hint}"):
        count_trainable(tiny_config(), LoraConfig(targets=("c_attn", name)))


class Block(torch.nn.Module):
    """Just the module names and shapes of one Qwen v1 layer, for PEFT to find its targets in."""

    def __init__(self, cfg):
        super().__init__()
        D, M, F = cfg.hidden_size, cfg.attention_size, cfg.ffn_size
        self.attn = torch.nn.ModuleDict(
            {"c_attn": torch.nn.Linear(D, 3 * M), "c_proj": torch.nn.Linear(M, D, bias=False)}
        )
        self.mlp = torch.nn.ModuleDict(
            {
                "w1": torch.nn.Linear(D, F, bias=False),
                "w2": torch.nn.Linear(D, F, bias=False),
                "c_proj": torch.nn.Linear(F, D, bias=False),
            }
        )


class Skeleton(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.config = {"model_type": "qwen"}
        blocks = torch.nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        self.transformer = torch.nn.ModuleDict({"h": blocks})


def test_peft_loads_our_adapter_and_merges_to_the_same_weights(tmp_path):
    cfg, lora_cfg = tiny_config(), LoraConfig(rank=4, alpha=12.0, targets=TARGETS)
    lora = trained_lora(cfg, lora_cfg)
    save_peft(tmp_path, cfg, lora_cfg, lora, base_name="tiny", fingerprint="f" * 64)
    skeleton = Skeleton(cfg)
    before = {name: w.detach().clone() for name, w in skeleton.named_parameters()}
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    config.task_type = None  # the skeleton generates nothing
    wrapped = peft.PeftModel.from_pretrained(skeleton, str(tmp_path), config=config)
    merged = dict(wrapped.merge_and_unload().named_parameters())
    tree = lora.weights["layers"]
    for layer in range(cfg.num_layers):
        for (block, leaf), name in zip(
            [("attn", "wqkv"), ("attn", "wo"), ("mlp", "up"), ("mlp", "gate"), ("mlp", "down")],
            ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"),
            strict=True,
        ):
            full = f"transformer.h.{layer}.{name}.weight"
            pair = {side: tree[block][leaf][side][layer] for side in "ab"}
            base = before[full].numpy()
            shape = (*pair["b"].shape[:-1], base.shape[-1])
            ours = merged_weight(base.reshape(shape), pair, lora_cfg.scale)
            theirs = merged[full].detach().numpy()
            assert np.abs(theirs - base).max() > 1e-3
            np.testing.assert_allclose(np.reshape(ours, base.shape), theirs, atol=1e-6)


def test_an_adapter_in_use_equals_the_merged_model(tmp_path):
    cfg, lora_cfg = tiny_config(), LoraConfig(rank=4, targets=TARGETS, use_rslora=True)
    weights = random_weights(cfg)
    params, lora = to_params(cfg, weights), trained_lora(cfg, lora_cfg)
    save_peft(tmp_path, cfg, lora_cfg, lora, base_name="tiny", fingerprint="f")
    loaded, _ = load_peft(tmp_path, cfg, fingerprint="f")
    ids = np.arange(40, dtype=np.int32)[None]
    with_adapter = model.logits(cfg, params, loaded, ids)
    merged = jax.tree.map(lambda x: x, params)
    for block, leaves in lora.weights["layers"].items():
        for leaf, pair in leaves.items():
            stack = merged["layers"][block][leaf]
            merged["layers"][block][leaf] = jax.vmap(
                lambda w, p: merged_weight(w, p, lora_cfg.scale)
            )(stack, pair)
    np.testing.assert_allclose(with_adapter, model.logits(cfg, merged, None, ids), atol=1e-4)
    assert np.abs(with_adapter - model.logits(cfg, params, None, ids)).max() > 0.1


@pytest.fixture
def saved(tmp_path):
    cfg, lora_cfg = tiny_config(), LoraConfig(rank=4, targets=("c_attn", "w1"))
    lora = trained_lora(cfg, lora_cfg)
    save_peft(tmp_path, cfg, lora_cfg, lora, base_name="tiny", fingerprint="a" * 64)
    return cfg, tmp_path


def rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def test_an_adapter_of_another_base_is_refused(saved):
    cfg, folder = saved
    with pytest.raises(InputError, match="made for another base"):
        load_peft(folder, cfg, fingerprint="b" * 64)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.update(extra=np.zeros(1, np.float32)), "match nothing"),
        (lambda t: t.pop(sorted(t)[0]), "lacks 1 tensors"),
        (lambda t: t.update({sorted(t)[0]: np.zeros((4, 3), np.float32)}), r"is F32 \(4, 3\)"),
        (lambda t: t[sorted(t)[0]].fill(np.nan), "holds NaN or Inf"),
        (lambda t: t.clear(), "empty"),
    ],
)
def test_bad_adapter_tensors_are_refused(saved, change, message):
    cfg, folder = saved
    rewrite(folder, change)
    with pytest.raises(InputError, match=message):
        load_peft(folder, cfg)


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"peft_type": "IA3"}, "only LORA adapters can be read"),
        ({"use_dora": True}, "use_dora is True: .*not implemented"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"modules_to_save": ["wte"]}, "modules_to_save"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        # These initializations subtract the adapter from the base, which then is another base.
        ({"init_lora_weights": "pissa_niter_16"}, "'pissa_niter_16' changed the base"),
        ({"bias": "all"}, "only 'none' can be read"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": 1e308}, "lora_alpha is 1e"),
        ({"use_rslora": "no"}, "use_rslora is 'no'"),
    ],
)
def test_settings_that_are_not_implemented_are_refused(saved, setting, message):
    cfg, folder = saved
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(InputError, match=message):
        load_peft(folder, cfg)


def test_a_truncated_adapter_is_refused(saved):
    cfg, folder = saved
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="not a readable safetensors file"):
        load_peft(folder, cfg)
