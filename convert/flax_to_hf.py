"""Exports a checkpoint as a Hugging Face folder, dequantized, with an adapter merged if given.

    python -m convert.flax_to_hf --input CKPT --output HF_DIR [--adapter DIR]

Weights that were not quantized come out bit for bit as they are stored. They pass through memory
one layer at a time; the folder appears under its name only when it is complete.
"""

import dataclasses
import functools
import pathlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from convert.hf_writer import StreamedTensor, write_sharded
from qwen_jax.adapters import Lora, load_peft, merged_weight
from qwen_jax.checkpoint import StoredParams
from qwen_jax.checkpoint_writer import copy_sidecars
from qwen_jax.cli import parse, run
from qwen_jax.errors import InputError
from qwen_jax.layout import row_slices
from qwen_jax.manifest import MANIFEST_NAME
from qwen_jax.params import ParamSpec, param_table
from qwen_jax.quant import QTensor, dequantize
from qwen_jax.staging import StagedFolder

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Export a checkpoint as Hugging Face weights of the original Qwen."""

    input: pathlib.Path
    """checkpoint folder"""
    output: pathlib.Path
    """Hugging Face folder to write"""
    adapter: pathlib.Path | None = None
    """PEFT LoRA folder to merge into the weights"""
    shard_size: str = "5GB"
    """largest weight file, such as 500MB"""
    overwrite: bool = False
    """replace an existing folder at --output"""


def export(
    checkpoint: pathlib.Path,
    output: pathlib.Path,
    *,
    adapter: pathlib.Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes the folder `output`; raises InputError, and leaves nothing, if anything is off."""
    begin = time.perf_counter()
    if (output / MANIFEST_NAME).exists():
        raise InputError(f"--output {output} is a checkpoint, not an export; give another folder")
    stored = StoredParams(checkpoint)
    manifest = stored.manifest
    lora = None
    if adapter is not None:
        lora, _ = load_peft(adapter, manifest.config, fingerprint=manifest.fingerprint)
    with (
        StagedFolder(output, "config.json", overwrite=overwrite) as staging,
        tqdm.tqdm(unit="B", unit_scale=True, desc="exporting") as bar,
    ):
        tensors = list(_tensors(stored, lora, bar))
        total = bar.total = sum(tensor.num_bytes for tensor in tensors)
        files = write_sharded(staging.folder, tensors, max_shard_bytes)
        copy_sidecars(checkpoint, staging.folder)
        staging.commit()
    seconds = time.perf_counter() - begin
    print(
        f"wrote {output}: {total / 1e6:.1f} MB in {len(files)} file(s), {seconds:.1f} s "
        f"({total / 1e6 / seconds:.1f} MB/s)"
    )


def _tensors(stored: StoredParams, lora: Lora | None, bar: tqdm.tqdm) -> Iterator[StreamedTensor]:
    """Every torch tensor in torch's order: table, layer by layer, final norm and head."""
    dtype = jnp.dtype(stored.manifest.dtype)
    table = param_table(stored.manifest.config)
    stacked = [spec for spec in table if spec.stacked]
    order = [(spec, 0) for spec in table if not spec.stacked]
    layers = [(spec, i) for i in range(stacked[0].layers) for spec in stacked]
    for spec, layer in [*order[:1], *layers, *order[1:]]:
        pair = None if lora is None else _layer_pair(lora, spec, layer)
        scale = 0.0 if lora is None else lora.scale
        blocks = _Blocks(functools.partial(_blocks, stored, spec, layer, pair, scale, dtype, bar))
        name = spec.torch_names()[layer]
        yield StreamedTensor(name, spec.torch_shape, dtype, blocks)


class _Blocks:
    """Blocks that are read when they are asked for."""

    def __init__(self, make: Any):
        self._make = make

    def __iter__(self) -> Iterator[np.ndarray]:
        return self._make()


def _blocks(
    stored: StoredParams,
    spec: ParamSpec,
    layer: int,
    pair: dict[str, Any] | None,
    scale: float,
    dtype: np.dtype,
    bar: tqdm.tqdm,
) -> Iterator[np.ndarray]:
    for index in [layer] if spec.stacked else row_slices(spec):
        leaf = stored.read(spec, index)
        if isinstance(leaf, QTensor):
            # Kept in float32 until the adapter is added: one rounding instead of two.
            leaf = dequantize(jax.tree.map(jnp.asarray, leaf), jnp.float32)
        if pair is not None:
            leaf = merged_weight(leaf, pair, scale)
        block = np.asarray(leaf).astype(dtype, copy=False)
        yield block.reshape(-1, *spec.torch_shape[1:])
        bar.update(block.nbytes)


def _layer_pair(lora: Lora, spec: ParamSpec, layer: int) -> dict[str, Any] | None:
    """The adapter's a [R, I] and b [*O, R] for one layer of a weight; None if it has none."""
    node: Any = lora.weights
    for name in spec.path:
        if name not in node:
            return None
        node = node[name]
    return {side: node[side][layer] for side in ("a", "b")}


def parse_size(text: str) -> int:
    """'5GB' -> 5,000,000,000 bytes; units are decimal, as in Hugging Face."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise InputError(f"--shard_size {text!r}: expected a size such as 5GB or 500MB")
    return size


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(Args, argv)
    export(
        args.input,
        args.output,
        adapter=args.adapter,
        max_shard_bytes=parse_size(args.shard_size),
        overwrite=args.overwrite,
    )


if __name__ == "__main__":
    run(main)
