"""Adapters that PEFT itself writes, with the options of other trainers; damaged ones refused."""

import json
import logging

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from test_adapters import Skeleton
from tiny import tiny_config

from qwen_jax.adapters import load_peft, merged_weight
from qwen_jax.errors import InputError

TARGETS = ["c_attn", "attn.c_proj", "w1", "w2", "mlp.c_proj"]
LEAVES = {
    "attn.c_attn": ("attn", "wqkv"),
    "attn.c_proj": ("attn", "wo"),
    "mlp.w1": ("mlp", "up"),
    "mlp.w2": ("mlp", "gate"),
    "mlp.c_proj": ("mlp", "down"),
}
CFG = tiny_config()


def save_foreign(folder, **options):
    """An adapter made and saved by PEFT; returns the weights before and after PEFT merges it."""
    torch.manual_seed(0)
    skeleton = Skeleton(CFG)
    before = {name: w.detach().clone().numpy() for name, w in skeleton.named_parameters()}
    config = dict(r=4, lora_alpha=12, target_modules=TARGETS) | options
    wrapped = peft.get_peft_model(skeleton, peft.LoraConfig(**config))
    for name, w in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(w, std=0.05)
    wrapped.save_pretrained(str(folder))
    after = {n: w.detach().numpy() for n, w in wrapped.merge_and_unload().named_parameters()}
    return before, after


def assert_merges_alike(folder, before, after):
    lora, lora_cfg = load_peft(folder, CFG)
    changed = 0
    for name, base in before.items():
        module = name.removeprefix("transformer.h.").removesuffix(".weight")
        layer, _, leaf = module.partition(".")
        pair = None
        if leaf in LEAVES:
            block, key = LEAVES[leaf]
            pair = lora.weights["layers"].get(block, {}).get(key)
        if pair is None:
            np.testing.assert_array_equal(base, after[name])
            continue
        pair = {side: pair[side][int(layer)] for side in "ab"}
        shape = (*pair["b"].shape[:-1], base.shape[-1])
        ours = np.reshape(merged_weight(base.reshape(shape), pair, lora.scale), base.shape)
        np.testing.assert_allclose(ours, after[name], atol=2e-6, err_msg=name)
        changed += not np.array_equal(base, after[name])
    assert changed
    return lora, lora_cfg


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 1, "lora_alpha": 1},
        {"r": 64, "lora_alpha": 16, "target_modules": ["c_attn", "w1", "w2"]},
        {"use_rslora": True, "r": 16},
        {"rank_pattern": {"c_attn": 2, "mlp.c_proj": 9}},
        {"alpha_pattern": {"attn.c_proj": 40, "w2": 1}},
        {"rank_pattern": {"w1": 8}, "alpha_pattern": {"w1": 3}, "use_rslora": True},
        {"rank_pattern": {"h.1.mlp.w1": 2, "w1": 6}, "alpha_pattern": {"c_proj": 5}},
        {"layers_to_transform": [1], "layers_pattern": "h"},
    ],
    ids=str,
)
def test_merges_as_peft_does(tmp_path, options):
    before, after = save_foreign(tmp_path, **options)
    _, lora_cfg = assert_merges_alike(tmp_path, before, after)
    targets = options.get("target_modules", TARGETS)
    assert list(lora_cfg.targets) == targets
    assert lora_cfg.use_rslora == options.get("use_rslora", False)


def rename_keys(folder, rename, dtype=None):
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors = {rename(k): v if dtype is None else v.astype(dtype) for k, v in tensors.items()}
    safetensors.numpy.save_file(tensors, path)


@pytest.mark.parametrize(
    "rename",
    [
        lambda k: k.replace("base_model.model.", ""),
        lambda k: k.replace("base_model.model.", "base_model.model.model."),
        lambda k: k.replace("base_model.model.", "base_model.model.module."),
        lambda k: k.replace(".weight", ".default.weight"),
    ],
)
def test_prefixes_and_adapter_names_of_other_trainers(tmp_path, rename):
    before, after = save_foreign(tmp_path)
    rename_keys(tmp_path, rename)
    assert_merges_alike(tmp_path, before, after)


def test_half_precision_adapters(tmp_path):
    save_foreign(tmp_path)
    want, _ = load_peft(tmp_path, CFG)
    rename_keys(tmp_path, lambda k: k, np.float16)
    got, _ = load_peft(tmp_path, CFG)
    a = got.weights["layers"]["mlp"]["up"]["a"]
    assert a.dtype == np.float32
    np.testing.assert_allclose(a, want.weights["layers"]["mlp"]["up"]["a"], atol=1e-3)


def test_an_adapter_that_does_not_name_its_base_is_taken_and_told_of(tmp_path, caplog):
    save_foreign(tmp_path)
    with caplog.at_level(logging.WARNING):
        load_peft(tmp_path, CFG, fingerprint="a" * 64)
    assert "cannot be checked" in caplog.text and str(tmp_path) in caplog.text


def test_pickle_is_refused_with_what_to_do(tmp_path):
    save_foreign(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.bin.*safe_serialization=True"):
        load_peft(tmp_path, CFG)


def change_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modules_to_save": ["wte", "lm_head"]}, "modules_to_save.*merge_and_unload"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "only 'none'"),
        ({"peft_type": "IA3"}, "only LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model"),
        ({"rank_pattern": {"(a+)+$": 4}}, "plain module names"),
        ({"rank_pattern": {"c_attn": 0}}, r"rank_pattern\['c_attn'\] is 0"),
        ({"r": 10**9}, "r is 1000000000; expected a rank from 1 to 8192"),
        ({"r": 8192}, "need a float"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"use_rslora": "yes"}, "expected true or false"),
        ({"layers_to_transform": ["1"]}, "no list of layers"),
        ({"fan_in_fan_out": True}, "transposed"),
        ({"alpha_pattern": [1]}, "expected numbers by module name"),
    ],
    ids=str,
)
def test_configs_that_mean_something_else_are_refused(tmp_path, values, message):
    save_foreign(tmp_path)
    change_config(tmp_path, **values)
    with pytest.raises(InputError, match=message):
        load_peft(tmp_path, CFG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"x{i}": np.ones(1) for i in range(9)}), r"'x0', 'x1'.* and 4 more"),
        (
            lambda t: t.update(
                {"base_model.model.transformer.wte.lora_embedding_A": np.ones((4, 211))}
            ),
            "lora_embedding_A",
        ),
        (lambda t: t.update({"h.0.attn.c_attn.lora_A.weight": np.ones((4, 64))}), "match nothing"),
        (
            lambda t: t.update(
                {"transformer.h.0.mlp.w1.lora_A.weight": np.ones((4, 64), np.float32)}
            ),
            "which are one",
        ),
        (
            lambda t: t.update(
                {"base_model.model.transformer.h.7.mlp.w1.lora_A.weight": np.ones((4, 64))}
            ),
            r"match nothing.*h\.7\.mlp",
        ),
        (lambda t: t[min(t)].fill(np.nan), "NaN or Inf"),
        (lambda t: t.update({min(t): np.ones((4, 64), np.int32)}), "is I32"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(tmp_path, change, message):
    save_foreign(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(InputError, match=message):
        load_peft(tmp_path, CFG)
