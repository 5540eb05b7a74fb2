"""The PyTorch side of the parity benchmark: transformers' Qwen2 with the same weights.

Nothing here calls our model or our quantization. What a quantized checkpoint stores is turned into
floats by a few lines of torch with bitsandbytes' tables, so that both sides can be wrong only in
different ways.
"""

import json
import pathlib

import numpy as np
import safetensors.numpy
import torch
import transformers
from bitsandbytes import functional as bnb

# Qwen v1 module -> the modules of Qwen2 that it is, cut along its outputs.
QWEN2_MODULES = {
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "mlp.w1": ("mlp.up_proj",),
    "mlp.w2": ("mlp.gate_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}


def load_qwen2(folder: pathlib.Path) -> transformers.Qwen2ForCausalLM:
    """The model in float32 with eager attention: the plainest arithmetic there is."""
    model = transformers.Qwen2ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, ids: list[int]) -> np.ndarray:  # float32 [T, V]
    return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


@torch.no_grad()
def greedy(
    model: torch.nn.Module, prompts: list[list[int]], count: int
) -> tuple[list[list[int]], list[list[float]]]:
    """For each prompt `count` likeliest tokens in a row, and how far each lies above the next."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=count, eos_token_id=None, pad_token_id=0
    )
    settings.output_logits = settings.return_dict_in_generate = True
    out = model.generate(tokens, attention_mask=mask, generation_config=settings)
    best = torch.stack(out.logits, dim=1).topk(2).values  # [B, count, 2]
    return out.sequences[:, longest:].tolist(), (best[..., 0] - best[..., 1]).tolist()


def dequantized(
    kind: str,
    data: np.ndarray,  # int8 [*O, I], or two codes a byte, uint8 [*O, I/2]
    scale: np.ndarray,  # [*O, groups]
    scale_absmax: np.ndarray | None = None,  # nf4: float32 [blocks of 256 scales]
    scale_offset: np.ndarray | None = None,  # nf4: float32 []
) -> torch.Tensor:  # float32 [O, I]
    """The floats that stored codes stand for, by the published rule of each format."""
    codes = torch.tensor(data).flatten(0, -2)
    if kind != "int8":
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
    if kind == "nf4":
        table = bnb.create_dynamic_map(signed=True)
        absmax = torch.tensor(scale_absmax).repeat_interleave(256)[: scale.size]
        scales = table[torch.tensor(scale).flatten().int()] * absmax + float(scale_offset)
        values = bnb.get_4bit_type("nf4", device="cpu")[codes.int()]
    else:
        scales = torch.tensor(np.asarray(scale, np.float32))
        values = codes.float() - (8 if kind == "int4" else 0)
    scales = scales.reshape(len(codes), -1)
    return values * scales.repeat_interleave(values.shape[1] // scales.shape[1], dim=1)


@torch.no_grad()
def expand_key_value_heads(model: transformers.Qwen2ForCausalLM) -> None:
    """Gives every query head keys and values of its own, in place; the logits stay the same.

    The original Qwen has no grouped queries: weights or adapters of its k and v fit only then.
    """
    for layer in model.model.layers:
        attention = layer.self_attn
        groups, attention.num_key_value_groups = attention.num_key_value_groups, 1
        for name in ("k_proj", "v_proj"):
            old = getattr(attention, name)
            new = torch.nn.Linear(old.in_features, old.out_features * groups)
            for kind in ("weight", "bias"):
                heads = getattr(old, kind).unflatten(0, (-1, attention.head_dim))
                getattr(new, kind).copy_(heads.repeat_interleave(groups, dim=0).flatten(0, 1))
            setattr(attention, name, new)
    model.config.num_key_value_heads = model.config.num_attention_heads


@torch.no_grad()
def replace_weight(
    model: torch.nn.Module,
    layer: int,
    module: str,  # Qwen v1's name, such as attn.c_attn
    weight: torch.Tensor,  # [O, I]
) -> None:
    """Overwrites one linear layer in place."""
    names = QWEN2_MODULES[module]
    for name, part in zip(names, weight.chunk(len(names)), strict=True):
        model.get_submodule(f"model.layers.{layer}.{name}").weight.copy_(part)


def write_qwen2_adapter(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a PEFT adapter for Qwen v1 under Qwen2's names.

    q, k and v each get c_attn's one A, and their third of its B.
    """
    renamed, modules = {}, set()
    for key, tensor in safetensors.numpy.load_file(source / "adapter_model.safetensors").items():
        # base_model.model.transformer.h.3.mlp.w1.lora_A.weight
        prefix, _, rest = key.partition(".transformer.h.")
        layer, _, rest = rest.partition(".")
        module, side, kind = rest.rsplit(".", 2)
        if (prefix, kind) != ("base_model.model", "weight"):
            raise ValueError(f"{key}: expected base_model.model.transformer.h.N.MODULE.lora_X")
        names = QWEN2_MODULES[module]
        parts = np.split(tensor, len(names)) if side == "lora_B" else [tensor] * len(names)
        for name, part in zip(names, parts, strict=True):
            full = f"{prefix}.model.layers.{layer}.{name}.{side}.weight"
            renamed[full] = np.ascontiguousarray(part)
            modules.add(name.rpartition(".")[2])
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    target.mkdir(parents=True, exist_ok=True)
    (target / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": sorted(modules)}), encoding="utf-8"
    )
    safetensors.numpy.save_file(renamed, target / "adapter_model.safetensors", {"format": "pt"})
