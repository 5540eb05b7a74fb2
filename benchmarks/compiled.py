"""Training steps compiled for H100s that are not there: memory beside the plan, what is sent.

    pip install -e '.[cuda]'                      the compiler; it asks for no GPU and no driver
    python -m benchmarks.compiled --meshes 1 data=2 fsdp=2 tensor=2
    python -m benchmarks.compiled --meshes fsdp=8 --quantize none int8 --remat full

XLA compiles from a description of the card, with the kernels that would run there; only what it
times to choose it leaves as it is. What it plans for arguments and temporaries is what a run then
takes (docs/benchmarks.md), so this checks the memory plan where there is no card, and shows what
nobody should have to pay: packed weights of many layers that are copied, arrays taken for others.
"""

import contextlib
import dataclasses
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from benchmarks.collectives import arrays_of, collectives, sent_by_kind
from benchmarks.train import CONFIGS, check_numbers
from qwen_jax.adapters import LoraConfig, abstract_lora
from qwen_jax.cli import parse, run
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UsageError
from qwen_jax.files import read_json_object
from qwen_jax.kernels.hopper import as_on_a_card
from qwen_jax.kernels.qmatmul import COMPUTE
from qwen_jax.memory import GB
from qwen_jax.params import abstract_params
from qwen_jax.quant import QuantFormat
from qwen_jax.sharding import MESH_AXES, check_tensor_axis, parse_mesh
from train.memory import MemoryPlan, Workload
from train.step import (
    Compute,
    TrainState,
    abstract_state,
    batch_sharding,
    compile_step,
    make_optimizer,
    make_schedule,
)

# Of XLA's GpuTargetConfigProto.
_H100 = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49_152,
    "shared_memory_per_core": 233_472,
    "shared_memory_per_block_optin": 232_448,
    "threads_per_core_limit": 2048,
    "core_count": 132,
    "fpus_per_core": 128,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65_535,
    "block_dim_limit_z": 65_535,
    "registers_per_core_limit": 65_536,
    "registers_per_block_limit": 65_536,
    "memory_bandwidth": 3_352_320_000_000,
    "l2_cache_size": 52_428_800,
    "clock_rate_ghz": 1.98,
    "device_memory_size": 84_929_347_584,
}
_CUDNN = 92000  # which its attention asks for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Compiles training steps for H100s, without one; a row for each combination."""

    meshes: tuple[str, ...] = ("1", "data=2", "fsdp=2", "tensor=2")
    """as --mesh has them"""
    config: str = "qwen_72b"
    """a file in configs/"""
    layers: int | None = None
    """unset: as many as the config has"""
    quantize: tuple[str, ...] = ("nf4",)
    """none, int8, int4, nf4"""
    seq: tuple[int, ...] = (2048,)
    """tokens of a row"""
    rows: int = 1
    """for each data or fsdp device"""
    remat: tuple[str, ...] = ("selective",)
    """as --remat has them; auto chooses for --device_memory"""
    compute: tuple[str, ...] = ("bf16",)
    """bf16, fp8"""
    device_memory: float = 82.9
    """GB of a card, for auto"""
    packed: bool = False
    """rows hold several sequences each"""
    lora_rank: int = 8
    """of all five targets"""
    hlo: str | None = None
    """a file for the text of the last program"""


def main(argv: list[str] | None = None) -> None:
    args = parse(Args, argv)
    for name in ("meshes", "quantize", "seq", "remat", "compute"):
        if not getattr(args, name):
            raise UsageError(f"--{name} names nothing")
    check_numbers(args, "rows", "seq", "lora_rank")
    if unknown := set(args.compute) - set(COMPUTE):
        raise UsageError(f"--compute {unknown.pop()}: expected one of {', '.join(COMPUTE)}")
    # The card is described, not there; a CPU is what stands behind jax meanwhile.
    jax.config.update("jax_platforms", "cpu")
    cfg = ModelConfig.from_hf(read_json_object(CONFIGS / f"{args.config}.json"))
    if args.layers is not None:
        cfg = dataclasses.replace(cfg, num_layers=args.layers)
    combinations = list(
        itertools.product(args.meshes, args.quantize, args.seq, args.remat, args.compute)
    )
    # All are planned before the first is compiled: a mistake in the last one shows at once.
    plans = [planned(args, cfg, *each[:4]) for each in combinations]
    described_mesh(parse_mesh("1"))
    with open(args.hlo, "w") if args.hlo else contextlib.nullcontext() as file:
        names = ("mesh", "base", "tokens", "remat", "compute", "arguments", "temporaries", "sum",
                 "planned", "", "weights copied", "mistaken", "sent", "compiled in")  # fmt: skip
        print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|", flush=True)
        for (mesh, *_, compute), (work, plan) in zip(combinations, plans, strict=True):
            text, line = row(work, plan, mesh, compute)
            print(line, flush=True)
        if file is not None:
            file.write(text)


def planned(
    args: Args, cfg: ModelConfig, mesh: str, base: str, seq: int, remat: str
) -> tuple[Workload, MemoryPlan]:
    """What a row compiles, and the plan of it; UsageError or InputError if that is nonsense."""
    sizes = parse_mesh(mesh)
    check_tensor_axis(sizes, {"heads": cfg.num_heads})
    work = Workload(
        cfg=cfg,
        format=QuantFormat.named(base),
        dtype=jnp.bfloat16,
        lora=LoraConfig(rank=args.lora_rank, alpha=2 * args.lora_rank),
        sizes=sizes,
        rows=args.rows,
        length=seq,
        packed=args.packed,
    )
    return work, work.plan(remat, int(args.device_memory * GB))


def row(work: Workload, plan: MemoryPlan, mesh: str, compute: str) -> tuple[str, str]:
    """The compiled program, and one line of the table."""
    began = time.perf_counter()
    text, used = compiled_step(work, plan, compute)
    seconds = time.perf_counter() - began
    temporaries = used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    total, expected = used.argument_size_in_bytes + temporaries, plan.budget.total
    remat = f"{plan.remat}{', embedding on the host' * plan.offload_embedding}"
    cells = (
        mesh, work.format.kind if work.format else "none", work.length, remat, compute,
        f"{used.argument_size_in_bytes / GB:.2f} GB", f"{temporaries / GB:.2f} GB",
        f"{total / GB:.2f} GB", f"{expected / GB:.2f} GB", f"{expected / total - 1:+.1%}",
        _copied(text, work), len(mistaken(text)),
        ", ".join(
            f"{kind} {size / GB:.3g} GB"
            for kind, size in sent_by_kind(collectives(text)).items()
        ),
        f"{seconds:.0f} s",
    )  # fmt: skip
    return text, f"| {' | '.join(map(str, cells))} |"


def _copied(text: str, work: Workload) -> str:
    if work.format is None:
        return "-"  # in bfloat16 weights look like what layers keep
    cfg = work.cfg
    values = cfg.hidden_size * max(3 * cfg.attention_size, cfg.ffn_size)
    largest = values if work.format.kind == "int8" else values // 2
    return f"{copied_weights(text, largest) / GB:.2f} GB"


def compiled_step(work: Workload, plan: MemoryPlan, products: str) -> tuple[str, Any]:
    """The step of a workload, its rows for each data or fsdp device, as HLO text, and its memory
    (jax's CompiledMemoryStats)."""
    compute = Compute(remat=plan.remat, products=products, mesh=described_mesh(work.sizes))
    with for_a_card():
        step, *arguments = abstract_step(
            work.cfg, work.format, work.dtype, work.lora, compute,
            rows=work.rows * work.sizes["data"] * work.sizes["fsdp"], length=work.length,
            packed=work.packed, offload_embedding=plan.offload_embedding,
        )  # fmt: skip
        program = step.trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
    return program.as_text(), program.memory_analysis()


def described_mesh(sizes: dict[str, int]) -> Mesh:
    """A mesh of H100s of one host that are not there; UsageError without jax's CUDA plugin."""
    fields = " ".join(f"{name}: {value}" for name, value in _H100.items())
    target = (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: 9 }} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 20 }} '
        f'runtime_version {{ major: 13 }} device_description_str: "NVIDIA H100 80GB HBM3"'
    )
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    try:
        there = topologies.get_topology_desc(
            platform="cuda", target_config=target, topology=f"1x1x{math.prod(shape)}"
        )
    except RuntimeError as error:  # its kinds are many
        raise UsageError(
            f"no compiler for CUDA ({str(error).splitlines()[0]}); if jax's plugin is missing: "
            f"pip install -e '.[cuda]'"
        ) from None
    devices = np.array(there.devices).reshape(shape)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


@contextlib.contextmanager
def for_a_card() -> Iterator[None]:
    """What is traced and lowered in here is for a Hopper card with a recent cuDNN."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    asked = {"check_cudnn_version": lambda: _CUDNN, "check_compute_capability": lambda _: True}
    with as_on_a_card(), mock.patch.multiple(cudnn, **asked):
        yield


def abstract_step(
    cfg: ModelConfig,
    fmt: QuantFormat | None,
    dtype: Any,
    lora_cfg: LoraConfig,
    compute: Compute,  # with a mesh
    *,
    rows: int,  # of the whole mesh
    length: int,
    packed: bool = False,
    offload_embedding: bool = False,
) -> tuple[Callable, TrainState, dict, dict]:
    """The step, to be lowered, and what it takes, without values: state, params, batch."""
    mesh = compute.mesh
    params = abstract_params(cfg, dtype, fmt, mesh)
    schedule = make_schedule("constant", 1e-4, 100)
    optimizer = make_optimizer(schedule)
    state = abstract_state(optimizer, abstract_lora(cfg, lora_cfg, mesh=mesh), mesh)
    tokens = jax.ShapeDtypeStruct((1, rows, length), jnp.int32, sharding=batch_sharding(mesh))
    batch = {"tokens": tokens, "loss_mask": tokens.update(dtype=jnp.bool_)}
    if packed:
        batch["segments"] = tokens
    if offload_embedding:
        shape = (*tokens.shape, cfg.hidden_size)
        batch["embedded"] = tokens.update(shape=shape, dtype=params.pop("wte").dtype)
    return compile_step(cfg, optimizer, schedule, state, params, compute), state, params, batch


_LINE = re.compile(r"^\s+(?:ROOT )?(%[\w.\-]+) = (.*?) ([\w\-]+)\((%[\w.\-]+)?")
_MADE_ELSEWHERE = ("parameter", "get-tuple-element", "bitcast", "tuple", "while", "conditional")


def _operations(text: str) -> Iterator[dict[str, re.Match]]:
    """The lines of each computation that is not inside a fusion, by the name of their result."""
    for computation in text.split("\n\n"):
        if not computation.lstrip().startswith(("%fused_", "%wrapped_")):
            found = filter(None, map(_LINE.match, computation.splitlines()))
            yield {match[1]: match for match in found}


def copied_weights(text: str, largest: int) -> int:
    """Bytes of packed weights that the program makes a second time, many layers of them: of arrays
    over `largest` bytes, what one layer's largest weight takes. A copy of fewer is not seen."""
    return sum(
        size
        for lines in _operations(text)
        for match in lines.values()
        if match[3] not in _MADE_ELSEWHERE
        for dtype, size in arrays_of(match[2])
        if dtype in ("u8", "s8") and size > largest
    )


def mistaken(text: str) -> list[str]:
    """Lines that take an array for one of another size: XLA's own mistakes."""
    found = []
    for lines in _operations(text):
        sizes = {name: sum(size for _, size in arrays_of(m[2])) for name, m in lines.items()}
        for name, match in lines.items():
            if match[3] == "bitcast" and sizes.get(match[4], sizes[name]) != sizes[name]:
                found.append(match[0].strip())
    return found


if __name__ == "__main__":
    run(main)
