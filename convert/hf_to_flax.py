"""Converts a Hugging Face folder of the original Qwen into a checkpoint, quantized if asked.

    python -m convert.hf_to_flax --input HF_DIR --output CKPT [--quantize none|int8|int4|nf4]

The official Int4 and Int8 folders (GPTQ) are taken as they are, code by code.
Everything that can be wrong is checked before work begins: family, names, shapes, group sizes. The
weights then pass through memory in blocks of rows, each tensor read once and checked for NaN. A run
that was killed, or stopped by a full disk, is gone on with by the same command.
"""

import contextlib
import dataclasses
import hashlib
import math
import pathlib
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Literal

import ml_dtypes  # noqa: F401  (numpy learns the name bfloat16)
import numpy as np
import tqdm

from convert.gptq import Gptq, check_zero_bias, linear_part, linear_tensors, read_gptq
from convert.hf_files import FLOAT_DTYPES, BadWeights, HfWeights, check_finite
from convert.host_quant import nf4_scales, rows_into
from convert.plan import print_plan
from convert.stream import Arrays, Part, scratch, stream
from qwen_jax.checkpoint_writer import CheckpointWriter
from qwen_jax.cli import parse, run
from qwen_jax.config import ModelConfig, load_hf_config
from qwen_jax.errors import InputError
from qwen_jax.layout import row_slices
from qwen_jax.manifest import Manifest
from qwen_jax.params import ParamSpec, abstract_params, param_table, tree_bytes
from qwen_jax.quant import QuantFormat

# Buffers of the rotary embedding that some published files carry; they follow from the config.
_DERIVED_SUFFIX = ".attn.rotary_emb.inv_freq"

_BLOCK_BYTES = 16_000_000  # of a source tensor, read and quantized at once by one thread


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Convert Hugging Face weights of the original Qwen into a checkpoint."""

    input: pathlib.Path
    """Hugging Face folder: config.json, safetensors, qwen.tiktoken"""
    output: pathlib.Path
    """checkpoint folder to write"""
    quantize: Literal["none", "int8", "int4", "nf4"] = "none"
    """storage of the linear layers; official Int4 and Int8 folders keep their own"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """dtype of everything that is not quantized"""
    overwrite: bool = False
    """replace an existing checkpoint at --output"""
    plan: bool = False
    """print what will be written and stop; needs config.json, no weights"""


def convert(
    source: pathlib.Path,
    output: pathlib.Path,
    *,
    fmt: QuantFormat | None = None,
    dtype: str = "bfloat16",
    overwrite: bool = False,
) -> Manifest:
    """Writes the checkpoint `output`, or goes on with what an interrupted run left of it.

    Raises InputError if anything is off; nothing is at `output` then, and what was finished is kept
    beside it for the next run.
    """
    begin = time.perf_counter()
    cfg, gptq = load_hf_config(source), read_gptq(source)
    if gptq is not None:
        fmt = _kept_format(source, gptq, fmt)
    # Making the abstract tree also finds widths that do not divide into the format's groups.
    out_bytes = tree_bytes(abstract_params(cfg, dtype, fmt))
    weights = open_weights(source, cfg, gptq)
    parts, fingerprint = hf_parts(weights, cfg, np.dtype(dtype), fmt, gptq)
    writer = CheckpointWriter(output, cfg, dtype, fmt, overwrite=overwrite)
    if (done := writer.published_by_a_killed_run(fingerprint)) is not None:
        print(f"{output} was complete already; removed what the interrupted run left beside it")
        return done
    total = sum(part.in_bytes for part in parts)
    with writer, _progress_kept(writer, output):
        missing = [part for part in parts if not writer.has(part.spec, part.index, part.key)]
        todo = sum(part.in_bytes for part in missing)
        if todo < total:
            print(f"going on: {(total - todo) / 1e6:.1f} of {total / 1e6:.1f} MB were done before")
        with tqdm.tqdm(
            total=total, initial=total - todo, unit="B", unit_scale=True, desc="converting"
        ) as bar:
            stream(missing, writer, bar.update)
        absent = writer.copy_sidecars(source)
        manifest = writer.commit(fingerprint)
    if "qwen.tiktoken" in absent:
        print(f"warning: {source} has no qwen.tiktoken; put it into {output} before chatting")
    seconds = time.perf_counter() - begin
    print(
        f"wrote {output}: {todo / 1e6:.1f} MB read in {seconds:.1f} s ({todo / 1e6 / seconds:.1f} "
        f"MB/s), {out_bytes / 1e6:.1f} MB of arrays, peak memory {peak_memory() / 1e6:.0f} MB"
    )
    return manifest


@contextlib.contextmanager
def _progress_kept(writer: CheckpointWriter, output: pathlib.Path) -> Iterator[None]:
    """Says, with whatever ended the work, that it can be gone on with."""
    try:
        yield
    except (InputError, KeyboardInterrupt) as error:
        if not writer.parts_done:
            raise
        kept = f"{writer.parts_done} parts are kept in {writer.unfinished}"
        mended = isinstance(error, BadWeights)  # the same files would only fail once more
        kept += ", for a run on mended weights" if mended else "; run the command again"
        if isinstance(error, InputError):
            raise InputError(f"{error}; {kept}") from error
        print(kept, file=sys.stderr)
        raise


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _kept_format(source: pathlib.Path, gptq: Gptq, fmt: QuantFormat | None) -> QuantFormat:
    """The format of a GPTQ folder, whose weights are never quantized a second time."""
    if fmt is not None and fmt.kind != gptq.fmt.kind:
        raise InputError(
            f"{source} is quantized to {gptq.bits} bits already; leave --quantize {fmt.kind} out, "
            "or convert the unquantized model"
        )
    return gptq.fmt


def open_weights(source: pathlib.Path, cfg: ModelConfig, gptq: Gptq | None = None) -> HfWeights:
    """Opens a folder that has exactly the table's tensors in their shapes; else InputError."""
    expected, integers, optional = {}, set(), set()
    for spec in param_table(cfg):
        for layer, name in enumerate(spec.torch_names()):
            if gptq is None or spec.role != "linear":
                expected[name] = spec.torch_shape
                continue
            module = spec.torch_module.format(layer=layer)
            for suffix, (shape, dtype) in linear_tensors(spec, gptq).items():
                expected[f"{module}.{suffix}"] = shape
                if dtype == "int32":
                    integers.add(f"{module}.{suffix}")
            optional.add(f"{module}.bias")

    def check_names(weights: HfWeights) -> None:
        check_names_and_shapes(weights, expected, integers, optional - set(expected))

    dtypes = (*FLOAT_DTYPES, "I32") if gptq else FLOAT_DTYPES
    return HfWeights(source, dtypes, check_names=check_names)


def check_names_and_shapes(
    weights: HfWeights,
    expected: dict[str, tuple[int, ...]],
    integers: set[str],
    optional: set[str],
) -> None:
    """InputError unless the folder has exactly these tensors; optional ones are biases of zeros."""
    names = {name for name in weights.names() if not name.endswith(_DERIVED_SUFFIX)}
    for name in sorted(names & optional):
        check_zero_bias(weights, name)
    names -= optional
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
    if odd := [
        name
        for name in expected
        if name in names and (weights.dtype(name) == np.int32) != (name in integers)
    ]:
        faults.append(f"has integers for floats, or floats for integers: {_listed(odd)}")
    if faults:
        raise InputError(
            f"{weights.folder} {'; it '.join(faults)}; config.json and weights must be of one "
            "original Qwen model"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def hf_parts(
    weights: HfWeights,
    cfg: ModelConfig,
    dtype: np.dtype,
    fmt: QuantFormat | None,
    gptq: Gptq | None = None,
) -> tuple[list[Part], str]:
    """Every tensor of the table as parts, each tensor read once; and the fingerprint of them all.

    The fingerprint reads vectors whole and of matrices the first row: enough to tell two fine-tunes
    apart. A part's key is the same of its one tensor, and the stamp of its file.
    """
    parts, digest = [], hashlib.sha256()
    for spec in param_table(cfg):
        for layer, name in enumerate(spec.torch_names()):
            if gptq is not None and spec.role == "linear":
                part, about = linear_part(weights, spec, layer, gptq)
                digest.update(about)
                parts.append(part)
                continue
            shape = weights.shape(name)
            about = f"{name} {weights.dtype(name).name} {list(shape)}\n".encode()
            about += weights.read(name, None if len(shape) == 1 else slice(0, 1)).tobytes()
            digest.update(about)
            key = f"{hashlib.sha256(about).hexdigest()[:16]}-{weights.stamp(name)}"
            for index in [layer] if spec.stacked else row_slices(spec):
                rows = slice(0, shape[0]) if spec.stacked else index
                parts.append(_part(weights, spec, name, index, rows, key, dtype, fmt))
    return parts, digest.hexdigest()


def _part(
    weights: HfWeights,
    spec: ParamSpec,
    name: str,
    index: int | slice,
    rows: slice,
    key: str,
    dtype: np.dtype,
    fmt: QuantFormat | None,
) -> Part:
    """One tensor's rows; they are read in blocks, checked for NaN, then cast or quantized."""
    row_bytes = math.prod(weights.shape(name)[1:]) * weights.dtype(name).itemsize
    step = max(1, _BLOCK_BYTES // row_bytes)
    leaf_fmt = spec.format(fmt)

    def quantize(block: slice, into: slice, arrays: Arrays) -> None:
        shape = (block.stop - block.start, *spec.torch_shape[1:])
        tensor = weights.read(name, block, scratch(shape, weights.dtype(name)))
        check_finite(tensor, name, block.start)
        data, scale = arrays["data"], arrays["scale"]
        if leaf_fmt.kind == "nf4":
            scale = arrays.setdefault("absmax", np.empty(scale.shape, np.float32))
        data, scale = (array.reshape(-1, array.shape[-1])[into] for array in (data, scale))
        rows_into(tensor, leaf_fmt, data, scale)

    def cast(block: slice, into: slice, arrays: Arrays) -> None:
        target = arrays[""].reshape(-1, *spec.torch_shape[1:])[into]
        same = weights.dtype(name) == dtype
        tensor = weights.read(name, block, target if same else None)
        check_finite(tensor, name, block.start)
        if not same:
            target[...] = tensor.astype(np.float32).astype(dtype, copy=False)

    def fill(block: slice, arrays: Arrays) -> None:
        into = slice(block.start - rows.start, block.stop - rows.start)
        (cast if leaf_fmt is None else quantize)(block, into, arrays)

    def finish(arrays: Arrays) -> Arrays:
        if "absmax" in arrays:
            arrays |= nf4_scales(arrays.pop("absmax"))
        return arrays

    return Part(
        spec=spec,
        index=index,
        key=key,
        in_bytes=(rows.stop - rows.start) * row_bytes,
        blocks=tuple(
            slice(i, min(i + step, rows.stop)) for i in range(rows.start, rows.stop, step)
        ),
        fill=fill,
        finish=finish,
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(Args, argv)
    fmt = QuantFormat.named(args.quantize)
    if args.plan:
        cfg, gptq = load_hf_config(args.input), read_gptq(args.input)
        fmt = fmt if gptq is None else _kept_format(args.input, gptq, fmt)
        print_plan(cfg, args.dtype, fmt, args.output)
        return
    convert(
        args.input,
        args.output,
        fmt=fmt,
        dtype=args.dtype,
        overwrite=args.overwrite,
    )


if __name__ == "__main__":
    run(main)
