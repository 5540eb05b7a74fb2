"""Proves a checkpoint: every byte against its checksums, and, if given, against its source.

    python -m convert.verify --checkpoint CKPT [--source HF_DIR]

Without a source it reads everything once. With one it also reads every tensor of the source again:
weights that were not quantized must be equal bit for bit, quantized ones equal to a new
quantization, and how far they are from the source is printed. Every fault is named; memory stays
bounded, as in the conversion.
"""

import concurrent.futures
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tqdm

from convert.compare import Difference, compare_part, torch_name, total_of
from convert.gptq import read_gptq
from convert.hf_to_flax import hf_parts, open_weights
from convert.stream import num_cores
from qwen_jax.checkpoint import StoredParams
from qwen_jax.cli import parse, run
from qwen_jax.config import load_hf_config
from qwen_jax.errors import InputError
from qwen_jax.files import read_json_object, write_json
from qwen_jax.layout import StoredLeaf, leaf_checksum, stored_leaves
from qwen_jax.manifest import load_manifest

_MEMORY_BYTES = 2_000_000_000  # a thread holds one weight twice, 0.8 GB at 72B
_SHOWN = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Check a checkpoint, and compare it with what it was converted from."""

    checkpoint: pathlib.Path
    """checkpoint folder"""
    source: pathlib.Path | None = None
    """Hugging Face folder that it was converted from"""
    report: pathlib.Path | None = None
    """JSON file for the differences of every tensor"""


def find_damage(checkpoint: pathlib.Path) -> list[str]:
    """One line for each fault of the files themselves; an empty list if all is well."""
    manifest = load_manifest(checkpoint)
    faults = []
    for name in ("_METADATA", "_CHECKPOINT_METADATA"):
        try:
            read_json_object(checkpoint / "params" / name)
        except InputError as error:
            faults.append(str(error))
    if (checkpoint / "config.json").is_file():
        try:
            same = load_hf_config(checkpoint) == manifest.config
            faults += [] if same else [f"{checkpoint}/config.json differs from the manifest"]
        except InputError as error:
            faults.append(str(error))
    leaves = stored_leaves(manifest.config, manifest.dtype, manifest.quantization)
    if set(manifest.checksums) != set(leaves):
        faults.append(f"{checkpoint}: the manifest has checksums of other arrays than the model's")
    try:
        stored = StoredParams(checkpoint)
    except InputError as error:  # an array that does not even open
        return [*faults, str(error)]
    work = [(name, i) for name, leaf in leaves.items() for i in range(len(leaf.files()))]
    digests: dict[str, list[str]] = {name: [] for name in leaves}
    total = sum(leaf.num_bytes for leaf in leaves.values())

    def check(item: tuple[str, int]) -> tuple[str, str, str | None]:
        name, number = item
        return name, *_check_file(stored, name, leaves[name], number)

    broken = set()
    with tqdm.tqdm(total=total, unit="B", unit_scale=True, desc="checksums") as bar:
        for name, digest, fault in _in_threads(check, work):
            digests[name].append(digest)
            if fault is not None:
                faults.append(fault)
                broken.add(name)
            bar.update(leaves[name].num_bytes // len(leaves[name].files()))
    for name, found in digests.items():
        if name not in broken and leaf_checksum(found) != manifest.checksums.get(name):
            faults.append(
                f"{name} is intact in itself but not what the manifest says: files of another "
                "conversion, or in another order"
            )
    return faults


def _check_file(
    stored: StoredParams, name: str, leaf: StoredLeaf, number: int
) -> tuple[str, str | None]:
    """The digest of one file, and what is wrong with it."""
    file = leaf.files()[number]
    try:
        digest = leaf.file_digest(stored.path / "params" / name / file)
        for index in leaf.read_steps(number):
            stored.array(name)[index].read().result()
    except FileNotFoundError:
        return "", f"{name}/{file} is missing"
    except (OSError, ValueError) as error:
        return "", f"{name}/{file} is damaged: {' '.join(str(error).split())[:200]}"
    return digest, None


def compare(
    checkpoint: pathlib.Path, source: pathlib.Path
) -> tuple[list[str], dict[str, Difference]]:
    """Faults, and the difference of every tensor (by torch name) from the source."""
    stored = StoredParams(checkpoint)
    manifest, gptq = stored.manifest, read_gptq(source)
    dtype, fmt = np.dtype(manifest.dtype), manifest.quantization
    if gptq is not None and fmt != gptq.fmt:
        raise InputError(f"{source} is GPTQ of {gptq.bits} bits; {checkpoint} was not made from it")
    weights = open_weights(source, manifest.config, gptq)
    parts, fingerprint = hf_parts(weights, manifest.config, dtype, fmt, gptq)
    faults: list[str] = []
    if fingerprint != manifest.fingerprint:
        faults.append(f"{checkpoint} was converted from other weights than {source}")
    largest = max(part.in_bytes for part in parts)
    threads = max(1, _MEMORY_BYTES // (2 * largest))
    found: dict[str, list[Difference]] = {}
    results = _in_threads(lambda part: compare_part(stored, weights, part), parts, threads)
    total = sum(part.in_bytes for part in parts)
    with tqdm.tqdm(total=total, unit="B", unit_scale=True, desc="comparing") as bar:
        for part, difference in zip(parts, results, strict=True):
            found.setdefault(torch_name(part), []).append(difference)
            bar.update(part.in_bytes)
    differences = {name: total_of(some) for name, some in found.items()}
    for name, difference in differences.items():
        if difference.wrong:
            faults.append(f"{name}: {difference.wrong} of {difference.count} stored values differ")
    return faults, differences


def _in_threads(
    function: Callable[[Any], Any], items: Iterable[Any], threads: int = 1_000
) -> Iterator[Any]:
    """Results in order; on all cores, or on fewer `threads`."""
    with concurrent.futures.ThreadPoolExecutor(min(num_cores(), threads)) as pool:
        yield from pool.map(function, items)


def print_differences(stored: StoredParams, differences: dict[str, Difference]) -> None:
    """One line for each kind of weight, its worst layer named."""
    if stored.manifest.quantization is None:
        return
    print(
        f"{'quantized weight':34} {'rel. RMS error':>14} {'worst layer':>12}  {'largest error':>13}"
    )
    kinds: dict[str, dict[str, Difference]] = {}
    for name, difference in differences.items():
        if difference.quantized:
            kind = ".".join("*" if word.isdigit() else word for word in name.split("."))
            kinds.setdefault(kind, {})[name] = difference
    for kind, members in kinds.items():
        mean = total_of(list(members.values())).relative_rms
        worst = max(members, key=lambda name: members[name].relative_rms)
        largest = max(difference.largest for difference in members.values())
        numbers = (mean, members[worst].relative_rms, largest)
        print(f"{kind:34}", *(f"{number:14.5f}" for number in numbers))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(Args, argv)
    begin = time.perf_counter()
    faults = find_damage(args.checkpoint)
    if args.source is not None and not faults:
        more, differences = compare(args.checkpoint, args.source)
        faults += more
        print_differences(StoredParams(args.checkpoint), differences)
        if args.report is not None:
            report = {name: dataclasses.asdict(found) for name, found in differences.items()}
            write_json(args.report, json.loads(json.dumps(report)))
    for fault in faults[:_SHOWN]:
        print(f"fault: {fault}")
    if faults:
        raise InputError(
            f"{args.checkpoint} has {len(faults)} fault(s), the first: {faults[0]}; convert or "
            "copy it again"
        )
    against = f", equal to {args.source}" if args.source else ""
    print(f"{args.checkpoint} is intact{against}; checked in {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    run(main)
