"""Generation at full width with random weights: tokens a second against the cards' memory.

    python -m benchmarks.decode --layers 80 --batch 1 4 16:int8 --context 1024
    python -m benchmarks.decode --batch 1 4 --peer         gpt-fast's recipe in PyTorch beside it
    python -m benchmarks.decode --mesh tensor=2 --against_one    on two cards, then on one of them
    python -m benchmarks.decode --share 2                  one card's share of tensor=2, no sums
    python -m benchmarks.decode --kind bf16 --layers 30    not quantized; int8 and nf4 too
    python -m benchmarks.decode --toy                      a size that a CPU can do

Steps are the engine's own dispatches, sampling with repetition penalty and top-p included. The
limit is bytes of a device (weights, scales, head, filled cache) over the read bandwidth measured in
the same process; GB/s are of one device. Memory is what lies on the first device while the program
runs: its arrays and its own work, beside what `--plan` of the programs says.
"""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks.profile import kernel_table
from benchmarks.random_weights import filled_cache, random_params
from qwen_jax import packed, runtime, steps
from qwen_jax.api import mesh_sizes
from qwen_jax.cache import init_cache
from qwen_jax.cli import parse, run
from qwen_jax.config import ModelConfig
from qwen_jax.engine import PREFILL_TOKENS, padded_rows
from qwen_jax.errors import UsageError
from qwen_jax.files import read_json_object
from qwen_jax.manifest import Manifest
from qwen_jax.memory import device_bytes
from qwen_jax.params import init_params
from qwen_jax.prefill import fill, forward
from qwen_jax.quant import QuantFormat
from qwen_jax.sampling import SamplingParams, row_keys, row_params
from qwen_jax.sharding import make_mesh, parse_mesh
from sample.plan import PREFILL_WORK, budget

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
KINDS = ("int4", "nf4", "int8", "bf16")
TOY = ModelConfig(
    vocab_size=512, hidden_size=128, num_layers=2, num_heads=4, head_dim=64, ffn_size=384
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Times decoding of a Qwen-shaped model with random packed weights."""

    config: str = "qwen_72b"  # a file in configs/
    kind: str = "int4"  # of the weights: int4, nf4, int8 or bf16
    mesh: str = ""  # devices, as for generation: 2, or tensor=2,data=2; default one
    against_one: bool = False  # the same on one device of the mesh too, and the ratio
    share: int = 1  # heads, FFN columns and vocabulary divided by so many, on one device
    layers: int | None = None  # default: as many as the config has
    batch: tuple[str, ...] = ("1",)  # rows such as 1 4 or 1,4; ":int8" for an int8 cache
    context: int = 1024  # tokens already in the cache
    greedy: bool = False  # the likeliest token instead of top-p 0.8 and penalty 1.1
    int8_head: bool = False  # the output head in int8
    dispatches: int = 6  # timed dispatches of steps.BLOCK tokens, after two that are not
    verify: int = 0  # also time one pass over so many tokens after the context, as for drafts
    prefill: int = 0  # also time a prompt of so many tokens
    prefill_chunk: int = PREFILL_TOKENS  # of them at once
    peer: bool = False  # first run benchmarks.decode_peer, for the batches without int8
    toy: bool = False  # a tiny model, for a machine without a GPU
    profile: bool = False  # print the longest kernels of a dispatch


def start(cfg: ModelConfig, args: Args, batch: int, capacity: int, dtype, mesh: Mesh | None):
    """Requests and the state after a prompt of `context` tokens."""
    sampling = SamplingParams(
        greedy=args.greedy, top_p=0.8, repetition_penalty=1.1, max_new_tokens=2**30
    )
    rows = [dataclasses.replace(sampling, seed=seed) for seed in range(batch)]
    requests = steps.Requests(
        rows=row_params(rows),
        keys=row_keys(rows),
        limits=jnp.full((batch,), 2**30, jnp.int32),
        stops=jnp.array([cfg.vocab_size - 1], jnp.int32),
    )
    state = steps.DecodeState(
        cache=filled_cache(cfg, batch, capacity, args.context, dtype, mesh),
        token=jnp.arange(batch, dtype=jnp.int32),
        seen=jnp.zeros((batch, cfg.vocab_size), bool),
        steps=jnp.zeros((batch,), jnp.int32),
        done=jnp.zeros((batch,), bool),
    )
    return requests, state


def room_for(tokens: int) -> int:
    """Slots of a cache for so many tokens."""
    return -(-tokens // 64) * 64


def bandwidth() -> float:
    size = 1 << 16 if jax.default_backend() == "gpu" else 1 << 10
    data = jax.random.bits(jax.random.key(0, impl="rbg"), (size // 4, size), jnp.uint32)
    total = jax.jit(lambda d: jnp.sum(d, axis=1))
    jax.block_until_ready(total(data))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(total(data))
        times.append(time.perf_counter() - began)
    return data.nbytes / float(np.median(times))


def measure(
    cfg: ModelConfig, args: Args, params: dict, batch: int, cache_dtype: str, rate: float,
    mesh: Mesh | None,
) -> dict:  # fmt: skip
    tokens = (args.dispatches + 4) * steps.BLOCK
    capacity = room_for(args.context + tokens)
    dtype = jnp.dtype(cache_dtype) if cache_dtype else params["wte"].dtype
    split = padded_rows(1, mesh)
    if batch % split:
        raise UsageError(f"a batch of {batch} rows on a mesh that splits them by {split}")
    requests, state = start(cfg, args, batch, capacity, dtype, mesh)
    fixed = (cfg, mesh, cfg.vocab_size, params, None, requests)
    began = time.perf_counter()
    state, block, _ = steps.decode(*fixed, state)
    jax.block_until_ready(block)
    compile_seconds = time.perf_counter() - began
    state, block, _ = steps.decode(*fixed, state)
    jax.block_until_ready(block)
    began = time.perf_counter()
    for _ in range(args.dispatches):
        state, block, _ = steps.decode(*fixed, state)
    jax.block_until_ready(block)
    seconds = (time.perf_counter() - began) / (args.dispatches * steps.BLOCK)
    filled = args.context + tokens // 2
    weights = device_bytes(params) - device_bytes(params["wte"])
    stacks = (state.cache.k, state.cache.v, state.cache.k_scale, state.cache.v_scale)
    kept = device_bytes(stacks) * filled / capacity
    limit = (weights + kept) / rate
    plan = planned(cfg, args, params["wte"].dtype, batch, capacity, mesh, cache_dtype or None)
    work = steps.decode.lower(*fixed, state).compile().memory_analysis()
    if args.profile and batch == 1:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                state, block, _ = steps.decode(*fixed, state)
                jax.block_until_ready(block)
            print(kernel_table(pathlib.Path(folder), steps.BLOCK, top=24), flush=True)
    return {
        "batch": batch,
        "devices": 1 if mesh is None else mesh.size,
        "cache": str(dtype),
        "tok/s": round(batch / seconds, 1),
        "ms/step": round(seconds * 1e3, 2),
        "GB/s": round((weights + kept) / seconds / 1e9, 2),
        "of limit": round(limit / seconds, 3),
        "limit tok/s": round(batch / limit, 1),
        "weights GB": round(weights / 1e9, 2),
        "cache GB": round(kept / 1e9, 2),
        "memory GB": round(memory(work) / 1e9, 2),
        "planned GB": round(plan / 1e9, 2),
        "compile s": round(compile_seconds, 1),
        "tokens differ": len(set(np.asarray(block).reshape(-1).tolist())),
    }


def memory(work: Any) -> int:
    """Bytes on the first device while a program runs that has all arrays now there."""
    held = (jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use", 0)
    return held + work.temp_size_in_bytes


def planned(
    cfg: ModelConfig, args: Args, dtype, rows: int, tokens: int, mesh: Mesh | None,
    cache_dtype: str | None = None, prefill: bool = False,
) -> int:  # fmt: skip
    """What the plan of the programs says for the same; decoding has no work of a prefill."""
    manifest = Manifest(
        config=cfg, dtype=str(dtype), quantization=format_of(args.kind), fingerprint="",
        checksums={},
    )  # fmt: skip
    sizes = parse_mesh("1") if mesh is None else dict(mesh.shape)
    plan = budget(manifest, sizes, rows, tokens, None, 0, cache_dtype=cache_dtype)
    return plan.total - (0 if prefill else plan.items[PREFILL_WORK])


def print_row(
    cfg: ModelConfig, args: Args, params: dict, name: str, rate: float, mesh: Mesh | None,
    mesh_speed: float = 0.0,
) -> float:  # fmt: skip
    """Measures one batch and returns its tokens a second; with `mesh_speed`, the ratio to these."""
    batch, _, cache_dtype = name.partition(":")
    try:
        row = measure(cfg, args, params, int(batch), cache_dtype, rate, mesh)
    except Exception as e:  # one row that fails must not hide the others
        print(f"batch {name}: {type(e).__name__}: {str(e)[:500]}", flush=True)
        return 0.0
    if mesh_speed:
        row["mesh / one"] = round(mesh_speed / row["tok/s"], 2)
    print(json.dumps(row), flush=True)
    return row["tok/s"]


def prefill_seconds(
    cfg: ModelConfig, params: dict, tokens: int, chunk: int, mesh: Mesh | None
) -> tuple[float, int]:
    """Time of one prompt through an empty cache, the head at its last token included; memory."""
    rows = padded_rows(1, mesh)
    counts = jnp.full((rows,), tokens, jnp.int32)

    @jax.jit
    def prompt(params, ids):
        cache = init_cache(cfg, rows, tokens, params["wte"].dtype, mesh)
        last, cache = fill(cfg, mesh, params, {}, cache, ids, counts, chunk)
        return packed.unembed(params, last, mesh), cache

    ids = jax.random.randint(jax.random.key(3), (rows, tokens), 0, cfg.vocab_size)
    jax.block_until_ready(prompt(params, ids))
    times = []
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready(prompt(params, ids))
        times.append(time.perf_counter() - began)
    work = prompt.lower(params, ids).compile().memory_analysis()
    return float(np.median(times)), memory(work) + work.output_size_in_bytes


def verify_seconds(
    cfg: ModelConfig, params: dict, context: int, tokens: int, mesh: Mesh | None
) -> float:
    """Time of one pass over `tokens` new tokens of one row, with all their logits."""
    rows, capacity = padded_rows(1, mesh), room_for(context + tokens)
    cache = filled_cache(cfg, rows, capacity, context, params["wte"].dtype, mesh)
    ids = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (rows, tokens))
    counts = jnp.full((rows,), tokens, jnp.int32)

    @functools.partial(jax.jit, donate_argnums=1)
    def several(params, cache):
        def one(_, carry):
            cache, total = carry
            hidden, new = forward(cfg, mesh, params, None, ids, cache, counts, fresh=False)
            total = total + packed.unembed(params, hidden, mesh).max()
            return new.replace(lengths=cache.lengths), total

        return jax.lax.fori_loop(0, 8, one, (cache, jnp.float32(0)))

    cache, _ = jax.block_until_ready(several(params, cache))
    began = time.perf_counter()
    jax.block_until_ready(several(params, cache))
    return (time.perf_counter() - began) / 8


def format_of(kind: str) -> QuantFormat | None:
    return QuantFormat.named("none" if kind == "bf16" else kind)


def make_params(cfg: ModelConfig, args: Args, mesh: Mesh | None) -> dict:
    if not args.toy:
        params = random_params(cfg, args.kind, mesh, args.int8_head)
    else:  # really packed; computing in float32 where the weights allow it
        dtype = jnp.bfloat16 if args.kind == "bf16" else jnp.float32
        params = init_params(cfg, jax.random.key(0), dtype, format_of(args.kind), mesh)
        params = packed.pack_params(params, int8_head=args.int8_head, mesh=mesh)
    return jax.block_until_ready(params)


def configured(args: Args) -> ModelConfig:
    config = CONFIGS / f"{args.config}.json"
    cfg = TOY if args.toy else ModelConfig.from_hf(read_json_object(config))
    sizes = {"num_heads": cfg.num_heads, "ffn_size": cfg.ffn_size, "vocab_size": cfg.vocab_size}
    wrong = [f"{name}={size}" for name, size in sizes.items() if size % args.share]
    if wrong:
        raise UsageError(f"--share {args.share} does not divide {', '.join(wrong)}")
    cfg = dataclasses.replace(cfg, **{name: size // args.share for name, size in sizes.items()})
    return dataclasses.replace(cfg, num_layers=args.layers) if args.layers else cfg


def main(argv=None):
    args = parse(Args, argv)
    batches = tuple(name for text in args.batch for name in text.split(","))
    args = dataclasses.replace(args, batch=batches)
    if args.peer:
        batches = [name for name in args.batch if ":" not in name]
        command = [sys.executable, "-m", "benchmarks.decode_peer", "--batch", *batches]
        command += ["--context", str(args.context), "--layers", str(args.layers or 80)]
        subprocess.run(command, check=False)
    runtime.configure()
    if args.kind not in KINDS:
        raise UsageError(f"--kind {args.kind}: expected one of {KINDS}")
    cfg = configured(args)
    mesh = make_mesh(mesh_sizes(args.mesh, cfg)) if args.mesh else None
    print(jax.devices()[0].device_kind, "jax", jax.__version__, flush=True)
    rate = bandwidth()
    print(f"row sums read {rate / 1e12:.2f} TB/s", flush=True)
    params = make_params(cfg, args, mesh)
    speeds = [print_row(cfg, args, params, name, rate, mesh) for name in args.batch]
    for tokens in (1, args.verify) if args.verify else ():
        seconds = verify_seconds(cfg, params, args.context, tokens, mesh)
        print(f"a pass over {tokens} tokens: {seconds * 1e3:.2f} ms", flush=True)
    if args.prefill:
        seconds, held = prefill_seconds(cfg, params, args.prefill, args.prefill_chunk, mesh)
        plan = planned(cfg, args, params["wte"].dtype, 1, args.prefill, mesh, prefill=True)
        print(
            f"prefill of {args.prefill} tokens: {seconds:.3f} s, memory {held / 1e9:.2f} GB, "
            f"planned {plan / 1e9:.2f}",
            flush=True,
        )
    if args.against_one and mesh is not None:
        del params  # or one card would hold its share and the whole
        params = make_params(cfg, args, None)
        for name, speed in zip(args.batch, speeds, strict=True):
            print_row(cfg, args, params, name, rate, None, speed)


if __name__ == "__main__":
    run(main)
