"""Exports a checkpoint as a Hugging Face folder, dequantized, with an adapter merged if given.

    python -m convert.flax_to_hf --input CKPT --output HF_DIR [--adapter DIR [--base HF_DIR]]

Weights that were not quantized come out bit for bit as they are stored. An adapter is merged onto
the dequantized weights, or with --base onto the original ones. Everything passes through memory in
blocks of rows; the folder appears under its name only when it is complete. After a merge the
report says how far the merged model is from the adapter in use on the checkpoint.
"""

import dataclasses
import pathlib
import re
import time
from collections.abc import Sequence

import numpy as np
import tqdm

from convert.compare_logits import Difference, difference, streamed_logits
from convert.export_rows import FolderSource, Source, StoredSource, export_tensors
from convert.gptq import read_gptq
from convert.hf_files import HfWeights
from convert.hf_to_flax import open_weights
from convert.hf_writer import write_sharded
from qwen_jax.adapters import Lora, load_peft
from qwen_jax.checkpoint import StoredParams
from qwen_jax.checkpoint_writer import copy_sidecars
from qwen_jax.cli import parse, run
from qwen_jax.config import load_hf_config
from qwen_jax.errors import InputError
from qwen_jax.files import read_json_object, write_json
from qwen_jax.manifest import MANIFEST_NAME
from qwen_jax.params import param_table
from qwen_jax.staging import StagedFolder
from qwen_jax.tokenizer import RANKS_FILE, Tokenizer

DEFAULT_TEXT = (
    "The sea is never quite still. Even on a calm day small waves run over each other towards the "
    "shore, and each of them carries a little light.\n"
    "问：什么是机器学习？答：机器学习是让计算机从数据中学习规律，并用这些规律对新的数据作出判断的方法。\n"
    "def area(width, height):\n    return width * height\n"
)
MOST_TOKENS = 512  # of the text that is compared; more would change the figures little

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
    base: pathlib.Path | None = None
    """with --adapter: original Hugging Face folder to merge onto, instead of --input's weights"""
    shard_size: str = "5GB"
    """largest weight file, such as 500MB"""
    text: pathlib.Path | None = None
    """with --adapter: text file on which the merged model is compared; default a few lines"""
    compare: bool = True
    """after a merge, measure how far it is from the adapter in use (two passes over the weights)"""
    overwrite: bool = False
    """replace an existing folder at --output"""


def export(
    checkpoint: pathlib.Path,
    output: pathlib.Path,
    *,
    adapter: pathlib.Path | None = None,
    base: pathlib.Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes the folder `output`; raises InputError, and leaves nothing, if anything is off."""
    begin = time.perf_counter()
    if (output / MANIFEST_NAME).exists():
        raise InputError(f"--output {output} is a checkpoint, not an export; give another folder")
    stored = StoredParams(checkpoint)
    source: Source = StoredSource(stored)
    lora = None if adapter is None else load_adapter(stored, adapter)
    if base is not None:
        source = _open_base(stored, base)
    with (
        StagedFolder(output, "config.json", overwrite=overwrite) as staging,
        tqdm.tqdm(unit="B", unit_scale=True, desc="exporting") as bar,
    ):
        tensors = list(export_tensors(stored.manifest.config, source, lora, bar.update))
        total = bar.total = sum(tensor.num_bytes for tensor in tensors)
        staging.clear()
        files = write_sharded(staging.folder, tensors, max_shard_bytes)
        copy_sidecars(base or checkpoint, staging.folder)
        _state_dtype(staging.folder, {np.dtype(tensor.dtype).name for tensor in tensors})
        staging.commit()
    seconds = time.perf_counter() - begin
    print(
        f"wrote {output}: {total / 1e6:.1f} MB in {len(files)} file(s), {seconds:.1f} s "
        f"({total / 1e6 / seconds:.1f} MB/s)"
    )


def load_adapter(stored: StoredParams, adapter: pathlib.Path) -> Lora:
    manifest = stored.manifest
    return load_peft(adapter, manifest.config, fingerprint=manifest.fingerprint)[0]


def compare(
    checkpoint: pathlib.Path, adapter: pathlib.Path, merged: pathlib.Path, text: str
) -> Difference | None:
    """The adapter in use on the checkpoint against the merged folder; None without a tokenizer."""
    stored = StoredParams(checkpoint)
    if not (checkpoint / RANKS_FILE).is_file():
        return None
    cfg = stored.manifest.config
    ids = np.array(Tokenizer.from_dir(checkpoint).encode(text)[:MOST_TOKENS], np.int32)
    if not len(ids) or ids.max() >= cfg.vocab_size:
        raise InputError(
            f"the text has {len(ids)} tokens up to {ids.max(initial=0)}, the model {cfg.vocab_size}"
            " rows for them; expected a text and the tokenizer of this model"
        )
    in_use = streamed_logits(cfg, StoredSource(stored), load_adapter(stored, adapter), ids)
    weights = HfWeights(merged)
    return difference(in_use, streamed_logits(cfg, FolderSource(weights), None, ids))


def _open_base(stored: StoredParams, base: pathlib.Path) -> FolderSource:
    """The original folder, if the checkpoint comes from it or has its very embedding and norms.

    A checkpoint of an official Int4 or Int8 folder has other files behind it than the original,
    but GPTQ leaves everything outside of the linear layers as it was.
    """
    cfg = load_hf_config(base)
    if cfg != stored.manifest.config:
        raise InputError(f"--base {base} has another config.json than {stored.path}; give its base")
    if read_gptq(base) is not None:
        raise InputError(f"--base {base} is quantized itself; give the original bfloat16 folder")
    source, own = FolderSource(open_weights(base, cfg)), StoredSource(stored)
    for spec in param_table(cfg):
        if spec.role == "linear":
            continue
        for layer in range(max(spec.layers, 1)):
            ours, theirs = next(own.blocks(spec, layer)), next(source.blocks(spec, layer))
            count = min(len(ours), len(theirs))
            if not _same(ours[:count], theirs[:count]):
                raise InputError(
                    f"--base {base}: {spec.torch_names()[layer]} differs from {stored.path}; merge "
                    "onto the model that the checkpoint was converted from"
                )
    return source


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to the last bit of bfloat16: a GPTQ folder keeps these tensors in float16."""
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    return bool(np.all(np.abs(a - b) <= np.abs(b) * 2.0**-7 + 2.0**-24))


def _state_dtype(folder: pathlib.Path, dtypes: set[str]) -> None:
    """Makes config.json tell of what was written: floats, and of which dtype."""
    path = folder / "config.json"
    if not path.is_file():
        return
    config = read_json_object(path)
    changed = {k: v for k, v in config.items() if k != "quantization_config"}
    for key in ("torch_dtype", "dtype"):
        if key in changed and len(dtypes) == 1:
            changed[key] = next(iter(dtypes))
    if changed != config:
        write_json(path, changed)


def parse_size(text: str) -> int:
    """'5GB' -> 5,000,000,000 bytes; units are decimal, as in Hugging Face."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise InputError(f"--shard_size {text!r}: expected a size such as 5GB or 500MB")
    return size


def _read_text(path: pathlib.Path | None) -> str:
    if path is None:
        return DEFAULT_TEXT
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(100_000)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text {path} cannot be read: {error}; expected UTF-8 text") from None


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(Args, argv)
    if args.base is not None and args.adapter is None:
        raise InputError("--base without --adapter would copy the folder; give both or neither")
    text = _read_text(args.text)
    export(
        args.input,
        args.output,
        adapter=args.adapter,
        base=args.base,
        max_shard_bytes=parse_size(args.shard_size),
        overwrite=args.overwrite,
    )
    if args.adapter is None or not args.compare:
        return
    found = compare(args.input, args.adapter, args.output, text)
    if found is None:
        print(f"the merge was not compared: {args.input} has no {RANKS_FILE} to read a text with")
        return
    print(f"merged against the adapter in use on {args.input}: {found}")


if __name__ == "__main__":
    run(main)
