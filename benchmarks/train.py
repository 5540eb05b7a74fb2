"""The training step at full width with random weights: speed, memory, compile time.

    python -m benchmarks.train --layers 80 --seq 2048 4096 8192
    python -m benchmarks.train --layers 80 --seq 2048 --compute bf16 fp8 --peer
    python -m benchmarks.train --layers 80 --seq 2048 --first_step
    python -m benchmarks.train --toy                      a size that a CPU can do

Random weights are made on the device; every token is trained. MFU counts the useful work, 4 FLOP a
parameter and token (forward, and the gradient of the inputs: frozen weights need none), HFU what
the device really computed, both against a bf16 GEMM measured in the same run. Each row runs in a
process of its own, so that its peak memory and its compile time are its own. The first step is
timed from the moment when weights are there: tracing, compiling, running. `--peer` runs
transformers with bitsandbytes and PEFT at the same shape (benchmarks/peer_train.py).
"""

import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from benchmarks.collectives import collectives, sent_by_kind
from benchmarks.profile import kernel_table
from qwen_jax import processes, runtime
from qwen_jax.adapters import LoraConfig, init_lora
from qwen_jax.cli import parse, run
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UsageError
from qwen_jax.files import read_json_object
from qwen_jax.memory import device_bytes, device_limit
from qwen_jax.params import init_params, num_parameters, tree_bytes
from qwen_jax.quant import QuantFormat
from qwen_jax.remat import Remat, saved_values
from qwen_jax.sharding import make_mesh, parse_mesh
from train.lora import micro_batches
from train.memory import MemoryPlan, Workload
from train.step import (
    Compute,
    TrainState,
    compile_step,
    init_state,
    make_optimizer,
    make_schedule,
)

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
GEMM = (4096, 8192, 24576)  # M, K, N of the measured ceiling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Times LoRA training steps of a Qwen-shaped model with random weights."""

    config: str = "qwen_72b"
    """a file in configs/"""
    layers: int | None = None
    """unset: as many as the config has"""
    seq: tuple[int, ...] = (2048,)
    """tokens of a row; a line of the table for each"""
    batch: int = 1
    """rows of a micro batch"""
    sequences: int = 1
    """of random lengths, that share a row"""
    accumulate: int = 1
    """micro batches of a step"""
    remat: tuple[str, ...] = ("auto",)
    """levels to compare"""
    compute: tuple[str, ...] = ("bf16",)
    """bf16, fp8"""
    quantize: str = "nf4"
    """none, int8, int4, nf4"""
    lora_rank: int = 8
    """of all five targets"""
    mesh: str = "1"
    """devices"""
    overlap: str = "auto"
    """auto, none, schedule, pipeline: see train/overlap.py"""
    offload_embedding: bool = False
    """embedding table in host memory; unset: only if auto remat gains by it"""
    device_memory: float | None = None
    """GB that auto remat may use; unset: what the device has"""
    steps: int = 5
    """timed steps, after two that are not"""
    peer: bool = False
    """run transformers + bitsandbytes + PEFT beside it"""
    first_step: bool = False
    """each line twice: with no compiled programs kept, and with those that the first run kept"""
    toy: bool = False
    """a tiny model, for a machine without a GPU"""
    profile: str | None = None
    """a folder: trace two steps into it and print the longest kernels"""
    child: bool = False
    """measure one line in this process"""


def main(argv: list[str] | None = None) -> None:
    runtime.configure()
    args = parse(Args, argv)
    check_numbers(args, "seq", "batch", "sequences", "accumulate", "lora_rank", "steps")
    if args.peer and args.sequences > 1:
        raise UsageError("--peer trains whole rows; leave out --sequences")
    if args.child:
        print(json.dumps(measure(args)))
        return
    ceiling = 0.0 if args.toy else float(_output("from benchmarks.train import *; print(gemm())"))
    if ceiling:
        print(f"bf16 GEMM {'x'.join(map(str, GEMM))}: {ceiling / 1e12:.0f} TFLOP/s")
    rows = []
    for seq, compute, remat in itertools.product(args.seq, args.compute, args.remat):
        row = None
        for kept, cache in kept_programs(args.first_step):
            row = in_child(args, seq, compute, remat, cache)
            if row is not None:
                print(f"{kept}{describe(row, ceiling)}", flush=True)
        rows.append(row)
    for seq in args.seq if args.peer else ():
        peer = _peer(args, seq)
        for row in rows if peer else ():
            if row is not None and row["seq"] == seq:
                print(f"seq {seq:>5}  {row['compute']:<4} {row['remat']}  ours / peer: "
                      f"{row['tokens_per_second'] / peer:.2f}", flush=True)  # fmt: skip


def check_numbers(args: object, *names: str) -> None:
    """UsageError unless each of these, or each number of it, is at least 1."""
    for name in names:
        value = getattr(args, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number < 1:
                raise UsageError(f"--{name} is {number}; expected at least 1")


def kept_programs(first_step: bool) -> Iterator[tuple[str, str | None]]:
    """Folders for compiled programs, and how many are in them: a new one twice, or the user's."""
    if not first_step:
        yield "", None
        return
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(2):
            yield f"{len(os.listdir(cache))} files of programs kept: ", cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """All that a step takes, of random weights."""

    cfg: ModelConfig
    mesh: Mesh
    memory: MemoryPlan
    params: dict
    batch: dict[str, np.ndarray]  # tokens, loss_mask, perhaps segments [A * B, T]
    accumulation: int  # A
    table: np.ndarray | None  # [V, D]: an embedding that stays on the host
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    state: TrainState
    weights: int  # bytes of params, with the embedding
    init_seconds: float

    def compiled(self, how: Compute):
        """The step as a program (state, params, batch) -> state, metrics."""
        step = compile_step(
            self.cfg, self.optimizer, self.schedule, self.state, self.params, how
        )  # fmt: skip
        return step.lower(self.state, self.params, self.placed()).compile()

    def placed(self) -> dict[str, jax.Array]:
        """The batch on its way to the devices."""
        return micro_batches(self.batch, self.accumulation, self.mesh, self.table)

    def steps(self, program, state: TrainState, count: int):
        """The state after `count` steps of a program, their losses, and mean seconds of a step.

        With the embedding on the host each looks up the rows of the next one while it runs, as
        train.lora does: the first ones are looked up before, the last ones for nobody.
        """
        batch, before, losses = self.placed(), None, []
        began = time.perf_counter()
        for _ in range(count):
            state, metrics = program(state, self.params, batch)
            losses.append(metrics["loss"])
            if self.table is not None:
                jax.block_until_ready(before)
                batch, before = self.placed(), metrics
        jax.block_until_ready((state, metrics))
        return state, losses, (time.perf_counter() - began) / count


def prepare(args: Args) -> Setup:
    """The model of one row, on the devices."""
    sizes = parse_mesh(args.mesh)
    mesh = make_mesh(sizes)
    name = "qwen_tiny" if args.toy else args.config
    cfg = ModelConfig.from_hf(read_json_object(CONFIGS / f"{name}.json"))
    cfg = dataclasses.replace(cfg, num_layers=args.layers or cfg.num_layers)
    dtype = jnp.dtype(jnp.float32 if args.toy else jnp.bfloat16)
    fmt, (seq,) = QuantFormat.named(args.quantize), args.seq
    lora_cfg = LoraConfig(rank=args.lora_rank, alpha=2 * args.lora_rank)
    work = Workload(
        cfg=cfg,
        format=fmt,
        dtype=dtype,
        lora=lora_cfg,
        sizes=sizes,
        rows=max(1, args.batch // (sizes["data"] * sizes["fsdp"])),
        length=seq,
        accumulation=args.accumulate,
        offload_embedding=args.offload_embedding,
        packed=args.sequences > 1,
    )
    limit = device_limit(mesh.devices.flat[0])
    allowed = int(args.device_memory * 1e9) if args.device_memory else limit
    (text,) = args.remat
    memory = work.plan(text, allowed)

    began = time.perf_counter()
    params = jax.block_until_ready(init_params(cfg, jax.random.key(0), dtype, fmt, mesh))
    weights, init_seconds = tree_bytes(params), time.perf_counter() - began
    table = processes.fetch(params.pop("wte")) if memory.offload_embedding else None
    shape = (args.accumulate * args.batch, seq)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, cfg.vocab_size, shape, np.int32)
    batch = {"tokens": tokens, "loss_mask": np.ones(shape, bool)}  # all are trained
    if args.sequences > 1:
        cuts = np.sort(rng.integers(1, seq, (shape[0], args.sequences - 1)), axis=1)
        batch["segments"] = (np.arange(seq)[:, None] >= cuts[:, None]).sum(-1, dtype=np.int32)
    lora = init_lora(cfg, lora_cfg, jax.random.key(1), mesh)
    schedule = make_schedule("constant", 1e-4, 100)
    optimizer = make_optimizer(schedule)
    return Setup(
        cfg=cfg, mesh=mesh, memory=memory, params=params, batch=batch,
        accumulation=args.accumulate, table=table,
        schedule=schedule, optimizer=optimizer, state=init_state(optimizer, lora, mesh),
        weights=weights, init_seconds=init_seconds,
    )  # fmt: skip


def measure(args: Args) -> dict:
    """One row: seconds a step, peak memory beside the plan's, compile time."""
    made = prepare(args)
    cfg, mesh, (seq,), remat = made.cfg, made.mesh, args.seq, made.memory.remat
    how = Compute(remat=remat, products=args.compute[0], mesh=mesh, overlap=args.overlap)
    began = time.perf_counter()
    compiled = made.compiled(how)
    compile_seconds = time.perf_counter() - began
    state, first, _ = made.steps(compiled, made.state, 1)
    first_seconds = time.perf_counter() - began
    sent = sent_by_kind(collectives(compiled.as_text())) if mesh.size > 1 else {}
    state, second, _ = made.steps(compiled, state, 1)
    seconds = _timed(made, compiled, state, args)
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in mesh.devices.flat]
    return {
        "seq": seq,
        "tokens": args.accumulate * args.batch * seq,
        "devices": mesh.size,
        "compute": args.compute[0],
        "remat": str(remat),
        "offload_embedding": made.memory.offload_embedding,
        "seconds": seconds,
        "useful": 4 * (num_parameters(cfg) - cfg.vocab_size * cfg.hidden_size),
        "computed": computed_flops(cfg, remat, seq),
        "peak": max(peaks),
        "planned": made.memory.budget.total,
        "weights": made.weights,
        "device_weights": device_bytes(made.params),
        "sent": sent,
        "compile_seconds": compile_seconds,
        "first_seconds": first_seconds,
        "init_seconds": made.init_seconds,
        "losses": [float(loss) for loss in first + second],
        "device": mesh.devices.flat[0].device_kind,
        "jax": jax.__version__,
    }


def _timed(made: Setup, compiled, state: TrainState, args: Args) -> float:
    """Mean seconds of a step; prints the kernels too if a profile is asked for."""
    state, _, seconds = made.steps(compiled, state, args.steps)
    if args.profile:
        with jax.profiler.trace(args.profile):
            made.steps(compiled, state, 2)
        print(kernel_table(pathlib.Path(args.profile), 2), flush=True)
    return seconds


def computed_flops(cfg: ModelConfig, remat: Remat, seq: int) -> float:
    """FLOP a token that the device computes: products, what remat repeats, causal attention."""
    D, M, F, L = cfg.hidden_size, cfg.attention_size, cfg.ffn_size, cfg.num_layers
    layer = 4 * D * M + 3 * D * F
    total = 4.0 * (L * layer + cfg.vocab_size * D)
    # The down projection's output is never needed again; the rest is made again unless kept.
    repeatable = D * (saved_values(cfg, "selective") - M)
    attention = 2 * seq * M / 2 * 2  # forward, two products, half of the square
    for count, level in remat.runs:
        total += count * attention * (3.5 if level != "full" else 4.5)
        total += count * 2.0 * repeatable * (level in ("full", "attention"))
    return total


def gemm() -> float:
    """FLOP/s of a bf16 product of the model's own kind, on random data."""
    m, k, n = GEMM
    x = jax.random.normal(jax.random.key(0), (m, k), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (n, k), jnp.bfloat16)

    @jax.jit
    def many(x, w):
        def body(_, total):
            y = jax.lax.dot_general(x + total.astype(x.dtype), w, (((1,), (1,)), ((), ())))
            return total + y[0, 0].astype(jnp.float32) * 1e-9

        return jax.lax.fori_loop(0, 100, body, jnp.zeros(()))

    jax.block_until_ready(many(x, w))
    began = time.perf_counter()
    jax.block_until_ready(many(x, w))
    return 100 * 2 * m * k * n / (time.perf_counter() - began)


def describe(row: dict, ceiling: float) -> str:
    """The row as a line."""
    rate = row["tokens"] / row["seconds"]
    remat = row["remat"] + (", embedding on the host" if row["offload_embedding"] else "")
    line = (
        f"seq {row['seq']:>5}  {row['compute']:<4} {remat:<26} {row['seconds']:8.4f} s/step "
        f"{rate:9.1f} tok/s"
    )
    if ceiling:
        per_device = rate / row["devices"] / ceiling
        line += f"  MFU {row['useful'] * per_device:5.1%} HFU {row['computed'] * per_device:5.1%}"
    planned, peak = row["planned"], row["peak"]
    error = f" ({planned / peak - 1:+.1%})" if peak else ""
    return (
        f"{line}  peak {peak / 1e9:6.2f} GB, planned {planned / 1e9:.2f}{error}  weights "
        f"{row['weights'] / 1e9:.2f} made in {row['init_seconds']:.0f} s  first step "
        f"{row['first_seconds']:.1f} s, compiling {row['compile_seconds']:.1f} s  loss "
        f"{row['losses'][0]:.3f} {row['losses'][-1]:.3f}  "
        f"{row['device']}, jax {row['jax']}"
    )


def in_child(
    args: Args, seq: int, compute: str, remat: str, cache: str | None = None
) -> dict | None:
    """One row, measured in a process of its own; None, said in a line, if that failed.

    `cache` is a folder for its compiled programs, instead of the user's.
    """
    one = dataclasses.replace(args, seq=(seq,), compute=(compute,), remat=(remat,), child=True)
    flags = [sys.executable, "-m", "benchmarks.train"]
    for field in dataclasses.fields(one):
        value = getattr(one, field.name)
        if isinstance(value, bool):
            flags += [f"--{field.name}"] if value else []
        elif isinstance(value, tuple):
            flags += [f"--{field.name}", *map(str, value)]
        elif value is not None:
            flags += [f"--{field.name}", str(value)]
    env = os.environ | ({"JAX_COMPILATION_CACHE_DIR": cache} if cache else {})
    done = subprocess.run(flags, stdout=subprocess.PIPE, text=True, env=env)
    *lines, last = done.stdout.splitlines() or [""]
    print("".join(line + "\n" for line in lines), end="", flush=True)
    if done.returncode:
        print(f"seq {seq} {compute} {remat}: exit {done.returncode} {last}", flush=True)
        return None
    row = json.loads(last)
    return {**row, "tokens_per_second": row["tokens"] / row["seconds"]}


def _peer(args: Args, seq: int) -> float:
    flags = [sys.executable, "-m", "benchmarks.peer_train", "--config", args.config]
    flags += ["--seq", str(seq), "--batch", str(args.batch), "--steps", str(args.steps)]
    flags += ["--layers", str(args.layers)] if args.layers else []
    done = subprocess.run(flags, stdout=subprocess.PIPE, text=True)
    *lines, last = done.stdout.splitlines() or ["0"]
    print("\n".join(lines), flush=True)
    return float(last) if done.returncode == 0 else 0.0


def _output(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    return done.stdout or "0"


if __name__ == "__main__":
    run(main)
