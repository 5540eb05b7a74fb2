"""Training on 2 to N GPUs and several hosts, COMPUTED from one card's step and from counted bytes.

    python -m benchmarks.scaling_model --meshes data=2 fsdp=2 tensor=2 data=2,fsdp=8

Nothing here is measured but the step of one card that is given. The step is compiled for each mesh
on virtual CPU devices, without weights, and its collectives counted (benchmarks/collectives.py).
The CPU computes bfloat16 in float32, so the program is compiled in float32 and floats are counted
at half their size, but for gradients of LoRA, which cards add up in float32 too. For each
collective, seconds = bytes that a device sends / the speed of the slowest link in its group + a
latency. Devices fill hosts in the order of the mesh, tensor fastest.

    apart     step of one card x its share of the work + all collectives, one after another
    together  what may hide is hidden, as far as there is computation to hide it: the gathers of a
              layer but the first of each pass, and the sums of gradients over data and fsdp. Sums
              of activations over tensor are never hidden.

Not in it: products that get slower as a tensor axis makes them narrower, what communication kernels
take from computing ones, hosts that wait for each other.
"""

import dataclasses
import math
import os

import jax
import jax.numpy as jnp

from benchmarks.collectives import Collective, collectives
from benchmarks.compiled import abstract_step
from benchmarks.train import CONFIGS
from qwen_jax.adapters import LoraConfig
from qwen_jax.cli import parse, run
from qwen_jax.config import ModelConfig
from qwen_jax.files import read_json_object
from qwen_jax.memory import weight_bytes
from qwen_jax.quant import QuantFormat
from qwen_jax.remat import Remat
from qwen_jax.sharding import make_mesh, parse_mesh
from train.step import Compute


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Computes how training would scale; measures nothing."""

    meshes: tuple[str, ...] = (
        "data=2", "fsdp=2", "tensor=2", "data=4", "fsdp=4", "tensor=4", "data=8", "fsdp=8",
        "data=2,fsdp=4", "tensor=8", "data=16", "data=2,fsdp=8", "fsdp=16",
    )  # fmt: skip
    """as --mesh has them"""
    config: str = "qwen_72b"
    """a file in configs/"""
    base: str = "nf4"
    """none (bfloat16), int8, int4, nf4"""
    seq: int = 2048
    """tokens of a sequence; one for each data or fsdp device"""
    remat: str = "selective"
    """of the measured step"""
    lora_rank: int = 8
    """of all five targets"""
    step_seconds: float = 1.0821
    """of one card with one sequence, measured"""
    gpus_a_host: int = 8
    """within it, NVLink"""
    nvlink: float = 450.0
    """GB/s that a GPU sends over NVLink (generation 4: 450)"""
    network: float = 50.0
    """GB/s that a GPU sends to other hosts (400 Gbit/s InfiniBand a GPU: 50)"""
    efficiency: float = 0.8
    """share of both speeds that collectives reach"""
    latency: float = 20.0
    """microseconds of a collective, besides its bytes"""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of a step, and GB that a device sends."""

    compute: float
    apart: float
    together: float
    nvlink: float
    network: float


def main(argv: list[str] | None = None) -> None:
    args = parse(Args, argv)
    sizes = {text: parse_mesh(text) for text in args.meshes}
    # Only compiled for: nothing runs on them.
    jax.config.update("jax_platforms", "cpu")
    most = max(math.prod(mesh.values()) for mesh in sizes.values())
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={most}"
    cfg = ModelConfig.from_hf(read_json_object(CONFIGS / f"{args.config}.json"))
    columns = (
        "GPUs", "mesh", "weights a GPU", "sent over NVLink", "over the network", "s/step apart",
        "scaling", "s/step together", "scaling", "tokens/s",
    )  # fmt: skip
    print(
        f"COMPUTED, not measured: {args.config}, base {args.base}, {args.seq} tokens, from one "
        f"card's {args.step_seconds} s/step; {args.gpus_a_host} GPUs a host, NVLink {args.nvlink} "
        f"and network {args.network} GB/s a GPU, {args.efficiency:.0%} of both, {args.latency} us "
        f"a collective\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
    )
    for text, mesh in sizes.items():
        found = counted(args, cfg, mesh)
        print(describe(args, cfg, text, mesh, estimate(args, mesh, found)), flush=True)


def counted(args: Args, cfg: ModelConfig, sizes: dict[str, int]) -> list[Collective]:
    """The collectives of a step, compiled for a mesh of virtual devices."""
    lora_cfg = LoraConfig(rank=args.lora_rank, alpha=2 * args.lora_rank)
    rows = sizes["data"] * sizes["fsdp"]
    compute = Compute(remat=Remat.parse(args.remat, cfg.num_layers), mesh=make_mesh(sizes))
    step, *arguments = abstract_step(
        cfg, QuantFormat.named(args.base), jnp.float32, lora_cfg, compute,
        rows=rows, length=args.seq,
    )  # fmt: skip
    return collectives(step.lower(*arguments).compile().as_text())


def estimate(args: Args, sizes: dict[str, int], found: list[Collective]) -> Estimate:
    """Seconds and bytes of a step, from what it sends."""
    compute = args.step_seconds / sizes["tensor"]
    sent = {True: 0.0, False: 0.0}
    total = hidden = 0.0
    first: dict[bool, float] = {}  # the longest gather of a layer: forward, backward
    for one in found:
        over_tensor = max(one.members) < sizes["tensor"]
        in_layers = one.times > 1 and "(loss)" not in one.place
        # Gradients of LoRA are added up in float32 on cards as well (layer_loop.Share).
        of_gradients = in_layers and not over_tensor and one.kind == "all-reduce"
        size = one.sent * (0.5 if one.dtypes == ("f32",) and not of_gradients else 1.0)
        far = len({member // args.gpus_a_host for member in one.members}) > 1
        sent[far] += size / 1e9
        speed = (args.network if far else args.nvlink) * args.efficiency * 1e9
        seconds = size / speed + one.times * args.latency * 1e-6
        total += seconds
        if in_layers and not over_tensor:
            hidden += seconds
            if one.kind == "all-gather":
                backward = "transpose" in one.place
                first[backward] = max(first.get(backward, 0.0), seconds)
    hidden = min(hidden - sum(first.values()), compute)
    return Estimate(compute, compute + total, compute + total - hidden, sent[False], sent[True])


def describe(args: Args, cfg: ModelConfig, text: str, sizes: dict, found: Estimate) -> str:
    """A row of the table, in Markdown."""
    devices = math.prod(sizes.values())
    sequences = sizes["data"] * sizes["fsdp"]
    weights = sum(weight_bytes(cfg, jnp.bfloat16, QuantFormat.named(args.base), sizes).values())
    apart, together = (
        sequences * args.step_seconds / seconds for seconds in (found.apart, found.together)
    )
    rate = sequences * args.seq / found.together
    return (
        f"| {devices} | {text} | {weights / 1e9:.1f} GB | {found.nvlink:.2f} GB | "
        f"{found.network:.2f} GB | {found.apart:.3f} | {apart:.2f} | {found.together:.3f} | "
        f"{together:.2f} | {rate:,.0f} |"
    )


if __name__ == "__main__":
    run(main)
