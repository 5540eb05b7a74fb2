"""The training step at full width with random weights: speed, memory, compile time.

    python -m benchmarks.train --layers 80 --seq 2048 4096 --remat auto
    python -m benchmarks.train --toy                      a size that a CPU can do

Random weights are made on the device; every token is trained. MFU counts the useful work, 4 FLOP a
parameter and token (forward, and the gradient of the inputs: frozen weights need none), HFU what
the device really computed, both against a GEMM measured in the same process. Each row runs in a
process of its own, so that its peak memory and its compile time are its own.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp

from benchmarks.profile import kernel_table
from qwen_jax import runtime
from qwen_jax.adapters import LoraConfig, init_lora
from qwen_jax.cli import parse, run
from qwen_jax.config import ModelConfig
from qwen_jax.files import read_json_object
from qwen_jax.params import init_params, num_parameters, tree_bytes
from qwen_jax.quant import QuantFormat
from qwen_jax.remat import Remat
from qwen_jax.sharding import make_mesh, parse_mesh
from train.step import batch_sharding, compile_step, init_state, make_optimizer, make_schedule

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Times LoRA training steps of a Qwen-shaped model with random weights."""

    config: str = "qwen_72b"  # a file in configs/
    layers: int | None = None  # default: as many as the config has
    seq: tuple[int, ...] = (2048,)  # tokens of a sequence; one row of the table for each
    batch: int = 1  # sequences a step
    remat: tuple[str, ...] = ("full",)  # levels to compare
    quantize: str = "nf4"  # none, int8, int4, nf4
    lora_rank: int = 8
    lora_target: str = "all"
    mesh: str = "1"
    steps: int = 5  # timed steps, after two that are not
    toy: bool = False  # a tiny model, for a machine without a GPU
    profile: str | None = None  # a folder: trace the steps into it and print the longest kernels
    child: bool = False  # one row in this process, as JSON on the last line


def measure(args: Args) -> dict:
    """One row: seconds a step, peak memory, compile time."""
    mesh = make_mesh(parse_mesh(args.mesh))
    name = "qwen_tiny" if args.toy else args.config
    cfg = ModelConfig.from_hf(read_json_object(CONFIGS / f"{name}.json"))
    if args.layers:
        cfg = dataclasses.replace(cfg, num_layers=args.layers)
    dtype = jnp.float32 if args.toy else jnp.bfloat16
    fmt = QuantFormat.named(args.quantize)
    seq, remat = args.seq[0], Remat.parse(args.remat[0], cfg.num_layers)
    began = time.perf_counter()
    params = jax.block_until_ready(init_params(cfg, jax.random.key(0), dtype, fmt, mesh))
    init_seconds = time.perf_counter() - began
    lora_cfg = LoraConfig(rank=args.lora_rank, alpha=16, targets=tuple(args.lora_target.split(",")))
    schedule = make_schedule("constant", 1e-4, 100)
    optimizer = make_optimizer(schedule)
    state = init_state(optimizer, init_lora(cfg, lora_cfg, jax.random.key(1), mesh), mesh)
    tokens = jax.random.randint(jax.random.key(2), (1, args.batch, seq), 0, cfg.vocab_size)
    batch = {"tokens": tokens, "loss_mask": jnp.ones(tokens.shape, bool)}
    batch = jax.device_put(batch, batch_sharding(mesh))
    step = compile_step(cfg, optimizer, schedule, state, params, remat=remat, mesh=mesh)
    began = time.perf_counter()
    compiled = step.lower(state, params, batch).compile()
    compile_seconds = time.perf_counter() - began
    analysis = compiled.memory_analysis()
    temporary = getattr(analysis, "temp_size_in_bytes", 0)
    losses = []
    for _ in range(2):
        state, metrics = compiled(state, params, batch)
        losses.append(float(metrics["loss"]))
    seconds = _timed(compiled, state, params, batch, args)
    stats = mesh.devices.flat[0].memory_stats() or {}
    row = {
        "layers": cfg.num_layers,
        "parameters": num_parameters(cfg),
        "embedding": cfg.vocab_size * cfg.hidden_size,
        "seq": seq,
        "batch": args.batch,
        "remat": str(remat),
        "seconds": seconds,
        "tokens_per_second": args.batch * seq / seconds,
        "peak": stats.get("peak_bytes_in_use", 0),
        "weights": tree_bytes(params),
        "temporary": temporary,
        "compile_seconds": compile_seconds,
        "init_seconds": init_seconds,
        "losses": losses,
        "device": mesh.devices.flat[0].device_kind,
        "jax": jax.__version__,
    }
    return row


def _timed(compiled, state, params, batch, args: Args) -> float:
    """Mean seconds of a step; prints the kernels too if a profile is asked for."""

    def steps(state, count):
        began = time.perf_counter()
        for _ in range(count):
            state, metrics = compiled(state, params, batch)
        jax.block_until_ready((state, metrics))
        return state, (time.perf_counter() - began) / count

    state, seconds = steps(state, args.steps)
    if args.profile:
        with jax.profiler.trace(args.profile):
            steps(state, 2)
        print(kernel_table(pathlib.Path(args.profile), 2), flush=True)
    return seconds


def gemm_ceiling() -> float:
    """FLOP/s of a bf16 product of the model's own kind, on random data."""
    m, k, n = 4096, 8192, 24576
    x = jax.random.normal(jax.random.key(0), (m, k), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (n, k), jnp.bfloat16)

    @jax.jit
    def many(x, w):
        def body(_, total):
            y = jax.lax.dot_general(x + total.astype(x.dtype), w, (((1,), (1,)), ((), ())))
            return total + y[0, 0].astype(jnp.float32) * 1e-9

        return jax.lax.fori_loop(0, 20, body, jnp.zeros(()))

    jax.block_until_ready(many(x, w))
    began = time.perf_counter()
    jax.block_until_ready(many(x, w))
    return 20 * 2 * m * k * n / (time.perf_counter() - began)


def describe(row: dict, ceiling: float) -> str:
    useful = 4 * (row["parameters"] - row["embedding"]) * row["tokens_per_second"]
    share = f"MFU {useful / ceiling:5.1%}  " if ceiling else ""
    return (
        f"seq {row['seq']:>5}  {row['remat']:<24} {row['seconds']:8.4f} s/step "
        f"{row['tokens_per_second']:9.1f} tok/s  {share}"
        f"peak {row['peak'] / 1e9:6.2f} GB (weights {row['weights'] / 1e9:.2f}, temporary "
        f"{row['temporary'] / 1e9:.2f})  compile {row['compile_seconds']:.1f} s  "
        f"loss {row['losses'][0]:.3f} {row['losses'][-1]:.3f}"
    )


def main(argv: list[str] | None = None) -> None:
    runtime.configure()
    args = parse(Args, argv)
    if args.child:
        print(json.dumps(measure(args)))
        return
    ceiling = 0.0
    for seq in args.seq:
        for remat in args.remat:
            row = _in_child(args, seq, remat)
            if row is None:
                continue
            if not ceiling and not args.toy:
                ceiling = float(_ceiling_in_child())
                print(f"{row['device']}, jax {row['jax']}, GEMM {ceiling / 1e12:.0f} TFLOP/s")
            print(describe(row, ceiling), flush=True)


def _in_child(args: Args, seq: int, remat: str) -> dict | None:
    one = dataclasses.replace(args, seq=(seq,), remat=(remat,), child=True)
    flags = [sys.executable, "-m", "benchmarks.train"]
    for field in dataclasses.fields(one):
        value = getattr(one, field.name)
        if isinstance(value, bool):
            flags += [f"--{field.name}"] if value else []
        elif isinstance(value, tuple):
            flags += [f"--{field.name}", *map(str, value)]
        elif value is not None:
            flags += [f"--{field.name}", str(value)]
    done = subprocess.run(flags, stdout=subprocess.PIPE, text=True)
    *lines, last = done.stdout.splitlines() or [""]
    print("\n".join(lines), flush=True)
    if done.returncode:
        print(f"seq {seq} {remat}: failed with exit {done.returncode} {last}", flush=True)
        return None
    return json.loads(last)


def _ceiling_in_child() -> str:
    code = "from benchmarks.train import gemm_ceiling; print(gemm_ceiling())"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    return done.stdout or "0"


if __name__ == "__main__":
    run(main)
