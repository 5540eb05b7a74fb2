"""A tiny Int4 or Int8 checkpoint as AutoGPTQ writes it; packed here by the published rule.

The rule stands in convert/gptq.py's docstring; this file imports nothing from there.
"""

import json
import pathlib

import numpy as np
from safetensors.numpy import load_file, save_file

from demo.tiny_checkpoint import write_tiny_checkpoint

GROUP = 128
LINEAR = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")


def write_gptq_checkpoint(
    folder: pathlib.Path, bits: int, *, zero_biases: bool = True, **sizes
) -> dict[str, np.ndarray]:
    """Writes the folder; returns torch name -> float32 weight that its files stand for."""
    shape = dict(hidden_size=128, kv_channels=32, ffn=256, vocab_size=211)
    options = dict(dtype="float16", shards=1, tokenizer=False)
    write_tiny_checkpoint(folder, **(shape | options | sizes))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    weights = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    for name in [n for n in tensors if n.rpartition(".")[0].endswith(LINEAR)]:
        module, _, kind = name.rpartition(".")
        if kind == "weight":
            del tensors[name]
            packed, weights[name] = pack(weights[name], bits)
            tensors |= {f"{module}.{suffix}": array for suffix, array in packed.items()}
            if zero_biases:
                tensors.setdefault(f"{module}.bias", np.zeros(len(weights[name]), np.float16))
    save_file(tensors, path, metadata={"format": "pt"})
    quantization = {
        "bits": bits, "group_size": GROUP, "damp_percent": 0.01, "desc_act": False,
        "static_groups": False, "sym": True, "true_sequential": True,
        "model_name_or_path": None, "model_file_base_name": "model",
    }  # fmt: skip
    (folder / "quantize_config.json").write_text(json.dumps(quantization))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization | {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    return weights


def pack(
    weight: np.ndarray,  # float32 [N, K]
    bits: int,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The tensors of one layer, and the float32 weight [N, K] that they stand for."""
    N, K = weight.shape
    zero, top, per_word = 2 ** (bits - 1), 2**bits - 1, 32 // bits
    groups = weight.reshape(N, K // GROUP, GROUP)
    scales = (np.abs(groups).max(-1) * 2 / top).astype(np.float16)  # [N, K/128]
    step = scales.astype(np.float32)[..., None]
    codes = np.clip(np.round(groups / step) + zero, 0, top)
    dequantized = ((codes - zero) * step).reshape(N, K)
    codes = codes.reshape(N, K).T.astype(np.uint32)  # [K, N]
    qweight = np.zeros((K // per_word, N), np.uint32)
    for k in range(K):
        qweight[k // per_word] |= codes[k] << np.uint32(bits * (k % per_word))
    qzeros = np.zeros((K // GROUP, N // per_word), np.uint32)
    for n in range(N):
        qzeros[:, n // per_word] |= np.uint32((zero - 1) << bits * (n % per_word))
    packed = {
        "qweight": qweight.view(np.int32),
        "qzeros": qzeros.view(np.int32),
        "scales": np.ascontiguousarray(scales.T),
        "g_idx": (np.arange(K) // GROUP).astype(np.int32),
    }
    return packed, dequantized
