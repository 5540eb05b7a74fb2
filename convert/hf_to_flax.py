"""Converts a Hugging Face folder of the original Qwen into a checkpoint, quantized if asked.

    python -m convert.hf_to_flax --input HF_DIR --output CKPT [--quantize none|int8|int4|nf4]

Everything that can be wrong is checked before work begins: family, names, shapes, group sizes. The
weights then pass through memory one layer at a time, each tensor read once and checked for NaN.
"""

import dataclasses
import hashlib
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import tqdm

from convert.hf_files import HfWeights, check_finite
from qwen_jax.checkpoint_writer import CheckpointWriter
from qwen_jax.cli import parse, run
from qwen_jax.config import ModelConfig, load_hf_config
from qwen_jax.errors import InputError
from qwen_jax.layout import row_slices
from qwen_jax.manifest import Manifest
from qwen_jax.params import ParamSpec, abstract_params, param_table, tree_bytes
from qwen_jax.quant import QTensor, QuantFormat, quantize

# Buffers of the rotary embedding that some published files carry; they follow from the config.
_DERIVED_SUFFIX = ".attn.rotary_emb.inv_freq"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Convert Hugging Face weights of the original Qwen into a checkpoint."""

    input: pathlib.Path
    """Hugging Face folder: config.json, safetensors, qwen.tiktoken"""
    output: pathlib.Path
    """checkpoint folder to write"""
    quantize: Literal["none", "int8", "int4", "nf4"] = "none"
    """storage of the linear layers"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """dtype of everything that is not quantized"""
    overwrite: bool = False
    """replace an existing checkpoint at --output"""


def convert(
    source: pathlib.Path,
    output: pathlib.Path,
    *,
    fmt: QuantFormat | None = None,
    dtype: str = "bfloat16",
    overwrite: bool = False,
) -> Manifest:
    """Writes the checkpoint `output`; raises InputError, and leaves nothing, if anything is off."""
    begin = time.perf_counter()
    cfg = load_hf_config(source)
    # Making the abstract tree also finds widths that do not divide into the format's groups.
    out_bytes = tree_bytes(abstract_params(cfg, dtype, fmt))
    weights = HfWeights(source)
    check_names_and_shapes(weights, cfg)
    digest = hashlib.sha256()
    with CheckpointWriter(output, cfg, dtype, fmt, overwrite=overwrite) as writer:
        with tqdm.tqdm(
            total=weights.total_bytes, unit="B", unit_scale=True, desc="converting"
        ) as bar:
            writer.write_params(_parts(weights, cfg, jnp.dtype(dtype), fmt, digest, bar))
        absent = writer.copy_sidecars(source)
        manifest = writer.commit(digest.hexdigest())
    if "qwen.tiktoken" in absent:
        print(f"warning: {source} has no qwen.tiktoken; put it into {output} before chatting")
    seconds = time.perf_counter() - begin
    print(
        f"wrote {output}: {weights.total_bytes / 1e6:.1f} MB read, {out_bytes / 1e6:.1f} MB "
        f"written in {seconds:.1f} s ({weights.total_bytes / 1e6 / seconds:.1f} MB/s)"
    )
    return manifest


def check_names_and_shapes(weights: HfWeights, cfg: ModelConfig) -> None:
    """Raises InputError unless the folder has exactly the table's tensors in their shapes."""
    expected = {name: spec.torch_shape for spec in param_table(cfg) for name in spec.torch_names()}
    names = {name for name in weights.names() if not name.endswith(_DERIVED_SUFFIX)}
    faults = []
    if missing := [name for name in expected if name not in names]:
        faults.append(f"lacks {_listed(missing)}")
    if extra := sorted(names - set(expected)):
        faults.append(f"has unknown tensors {_listed(extra)}")
    wrong = [
        f"{name} {weights.shape(name)} instead of {shape}"
        for name, shape in expected.items()
        if name in names and weights.shape(name) != shape
    ]
    if wrong:
        faults.append(f"has shapes other than config.json implies: {_listed(wrong)}")
    if faults:
        raise InputError(
            f"{weights.folder} {'; it '.join(faults)}; config.json and weights must be of one "
            "original Qwen model"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _parts(
    weights: HfWeights,
    cfg: ModelConfig,
    dtype: np.dtype,
    fmt: QuantFormat | None,
    digest: Any,
    bar: tqdm.tqdm,
) -> Iterator[tuple[ParamSpec, int | slice, np.ndarray | QTensor]]:
    """Reads, checks and casts every tensor once, in the order of the table."""
    for spec in param_table(cfg):
        for layer, name in enumerate(spec.torch_names()):
            shape = list(weights.shape(name))
            digest.update(f"{name} {weights.dtype(name).name} {shape}\n".encode())
            for rows in [None] if spec.stacked else row_slices(spec):
                tensor = weights.read(name, rows)
                first_row = rows.start if rows else 0
                check_finite(tensor, name, first_row)
                # Vectors whole, of matrices the first row: enough to tell two fine-tunes apart.
                if tensor.ndim == 1:
                    digest.update(tensor.tobytes())
                elif first_row == 0:
                    digest.update(tensor[0].tobytes())
                index = rows if rows else layer
                yield spec, index, _stored(tensor, spec, dtype, fmt)
                bar.update(tensor.nbytes)


def _stored(
    tensor: np.ndarray,  # [rows, I] or [O]
    spec: ParamSpec,
    dtype: np.dtype,
    fmt: QuantFormat | None,
) -> np.ndarray | QTensor:
    if spec.stacked:
        tensor = tensor.reshape(spec.shape)
    leaf_fmt = spec.format(fmt)
    if leaf_fmt is not None:
        return quantize(jnp.asarray(tensor.astype(np.float32)), leaf_fmt)
    if tensor.dtype == np.float16:
        tensor = tensor.astype(np.float32)
    return tensor.astype(dtype, copy=False)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(Args, argv)
    convert(
        args.input,
        args.output,
        fmt=QuantFormat.named(args.quantize),
        dtype=args.dtype,
        overwrite=args.overwrite,
    )


if __name__ == "__main__":
    run(main)
