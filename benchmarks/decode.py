"""Generation at full width with random int4 weights: tokens a second against the card's memory.

    python -m benchmarks.decode --layers 80 --batch 1 4 16:int8 --context 1024
    python -m benchmarks.decode --batch 1 4 --peer         gpt-fast's recipe in PyTorch beside it
    python -m benchmarks.decode --toy                      a size that a CPU can do

Steps are the engine's own dispatches, sampling with repetition penalty and top-p included. The
limit is bytes (weights, scales, head, filled cache) over the read bandwidth measured in the same
process.
"""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.profile import kernel_table
from qwen_jax import packed, runtime, steps
from qwen_jax.cache import KVCache, abstract_cache
from qwen_jax.cli import parse, run
from qwen_jax.config import ModelConfig
from qwen_jax.files import read_json_object
from qwen_jax.kernels.packing import PackedWeight
from qwen_jax.params import init_params, tree_bytes
from qwen_jax.quant import QuantFormat
from qwen_jax.sampling import SamplingParams, row_keys, row_params

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
TOY = ModelConfig(
    vocab_size=512, hidden_size=128, num_layers=2, num_heads=2, head_dim=64, ffn_size=384
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Times decoding of a Qwen-shaped model with random packed weights."""

    config: str = "qwen_72b"  # a file in configs/
    layers: int | None = None  # default: as many as the config has
    batch: tuple[str, ...] = ("1",)  # rows, and ":int8" for an int8 cache; one line for each
    context: int = 1024  # tokens already in the cache
    greedy: bool = False  # the likeliest token instead of top-p 0.8 and penalty 1.1
    int8_head: bool = False  # the output head in int8
    dispatches: int = 6  # timed dispatches of steps.BLOCK tokens, after two that are not
    verify: int = 0  # also time one pass over so many tokens after the context, as for drafts
    prefill: int = 0  # also time a prompt of so many tokens
    check: bool = False  # first compare one layer with its reference
    peer: bool = False  # first run benchmarks.decode_peer, for the batches without int8
    toy: bool = False  # a tiny model, for a machine without a GPU
    profile: bool = False  # print the longest kernels of a dispatch


def random_packed(cfg: ModelConfig, int8_head: bool = False) -> dict:
    """A packed tree with random codes: what quantizing random weights would give, but at once."""
    L, D, F, V = cfg.num_layers, cfg.hidden_size, cfg.ffn_size, cfg.vocab_size
    N, H = cfg.num_heads, cfg.head_dim
    key = jax.random.key(0, impl="rbg")

    def weight(*out: int, size: int) -> PackedWeight:
        rows = int(np.prod(out)) // 16
        codes = jax.random.bits(key, (L, rows, size // 64, 32, 4), jnp.uint32)
        scale = jnp.full((L, rows, size // 512, 8, 8), 0.0043, jnp.float16)  # weights of 0.02
        return PackedWeight(codes=codes, scale=scale, out_shape=out, in_size=size)

    def table() -> jax.Array:
        return jax.random.normal(key, (V, D), jnp.bfloat16) * 0.02

    def packed_head() -> PackedWeight:
        codes = jax.random.bits(key, (1, V // 16, D // 32, 32, 4), jnp.uint32)
        scale = jnp.full((1, V), 0.00027, jnp.float32)
        return PackedWeight(codes=codes, scale=scale, out_shape=(V,), in_size=D, kind="int8")

    ones = jnp.ones((L, D), jnp.bfloat16)
    up_gate = weight(2, F, size=D)
    return {
        "wte": table(),
        "layers": {
            "ln_1": ones,
            "ln_2": ones,
            "attn": {
                "wqkv": weight(3, N, H, size=D),
                "bqkv": jnp.zeros((L, 3, N, H), jnp.bfloat16),
                "wo": weight(D, size=N * H),
            },
            "mlp": {"up_gate": up_gate, "down": weight(D, size=F)},
        },
        "ln_f": jnp.ones((D,), jnp.bfloat16),
        "lm_head": packed_head() if int8_head else table(),
    }


def filled_cache(cfg: ModelConfig, batch: int, capacity: int, context: int, dtype) -> KVCache:
    abstract = abstract_cache(cfg, batch, capacity, dtype)
    key = jax.random.key(7, impl="rbg")

    def values(x):
        if x is None:
            return None
        if x.ndim == 4:
            return jnp.full(x.shape, 0.01, x.dtype)

        def layer(_):  # one at a time: the generator needs several times its output
            if x.dtype == jnp.int8:
                return jax.random.bits(key, x.shape[1:], jnp.uint8).view(jnp.int8)
            bits = jax.random.bits(key, x.shape[1:], jnp.uint16)
            small = (bits & jnp.uint16(0x80FF)) | jnp.uint16(0x3F00)
            return small.view(jnp.bfloat16).astype(x.dtype)

        return jax.lax.map(layer, jnp.arange(x.shape[0]))

    @jax.jit
    def make() -> KVCache:
        rows = jnp.full((batch,), context, jnp.int32)
        return KVCache(
            k=values(abstract.k), v=values(abstract.v), lengths=rows, ntk=jnp.zeros_like(rows),
            k_scale=values(abstract.k_scale), v_scale=values(abstract.v_scale),
        )  # fmt: skip

    return make()


def start(cfg: ModelConfig, args: Args, batch: int, capacity: int, dtype):
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
        cache=filled_cache(cfg, batch, capacity, args.context, dtype),
        token=jnp.arange(batch, dtype=jnp.int32),
        seen=jnp.zeros((batch, cfg.vocab_size), bool),
        steps=jnp.zeros((batch,), jnp.int32),
        done=jnp.zeros((batch,), bool),
    )
    return requests, state


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


def check(cfg: ModelConfig) -> None:
    """One step through one layer: every kernel by name against the references."""
    cfg = dataclasses.replace(cfg, num_layers=1)
    params = random_packed(cfg)
    tokens = jnp.arange(3, dtype=jnp.int32)[:, None]

    @functools.partial(jax.jit, static_argnums=0)
    def step(implementation, params, cache):  # the weights as arguments, not as constants
        return packed.forward(cfg, params, tokens, cache, implementation=implementation)

    for dtype in (jnp.bfloat16, jnp.int8):
        cache = filled_cache(cfg, 3, 128, 77, dtype)
        cache = cache.replace(lengths=jnp.array([0, 77, 128], jnp.int32))
        want, reference = step("xla", params, cache)
        for name in (None, "mosaic"):
            try:
                got, written = step(name, params, cache)
            except Exception as e:
                print(f"{name}: {type(e).__name__}: {str(e)[:300]}", flush=True)
                continue
            diff, size = (jnp.linalg.norm(x.astype(jnp.float32)) for x in (got - want, want))
            new = 2 * 2 * cfg.attention_size  # two of three rows have room
            pairs = ((written.k, reference.k), (written.v, reference.v))
            wrong = sum(float(jnp.sum(a != b)) for a, b in pairs) / new
            print(f"{jnp.dtype(dtype)} cache, {name or 'automatic choice'}: relative error "
                  f"{float(diff / size):.1e}, {wrong:.1%} of new keys and values differ",
                  flush=True)  # fmt: skip


def measure(
    cfg: ModelConfig, args: Args, params: dict, batch: int, cache_dtype: str, rate: float
) -> dict:
    tokens = (args.dispatches + 4) * steps.BLOCK
    capacity = -(-(args.context + tokens) // 64) * 64
    dtype = jnp.dtype(cache_dtype) if cache_dtype else params["wte"].dtype
    requests, state = start(cfg, args, batch, capacity, dtype)
    fixed = (cfg, None, cfg.vocab_size, params, None, requests)
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
    weights = tree_bytes(params) - tree_bytes(params["wte"])
    stacks = (state.cache.k, state.cache.v, state.cache.k_scale, state.cache.v_scale)
    kept = tree_bytes([x for x in stacks if x is not None]) * filled / capacity
    limit = (weights + kept) / rate
    memory = jax.local_devices()[0].memory_stats() or {}
    if args.profile and batch == 1:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                state, block, _ = steps.decode(*fixed, state)
                jax.block_until_ready(block)
            print(kernel_table(pathlib.Path(folder), steps.BLOCK, top=24), flush=True)
    return {
        "batch": batch,
        "cache": str(dtype),
        "tok/s": round(batch / seconds, 1),
        "ms/step": round(seconds * 1e3, 2),
        "GB/s": round((weights + kept) / seconds / 1e9),
        "of limit": round(limit / seconds, 3),
        "limit tok/s": round(batch / limit, 1),
        "weights GB": round(weights / 1e9, 2),
        "cache GB": round(kept / 1e9, 2),
        "peak GB": round(memory.get("peak_bytes_in_use", 0) / 1e9, 1),
        "compile s": round(compile_seconds, 1),
        "tokens differ": len(set(np.asarray(block).reshape(-1).tolist())),
    }


def print_row(cfg: ModelConfig, args: Args, params: dict, name: str, rate: float) -> None:
    batch, _, cache_dtype = name.partition(":")
    try:
        row = measure(cfg, args, params, int(batch), cache_dtype, rate)
        print(json.dumps(row), flush=True)
    except Exception as e:  # one row that fails must not hide the others
        print(f"batch {name}: {type(e).__name__}: {str(e)[:500]}", flush=True)


def prefill_seconds(cfg: ModelConfig, params: dict, tokens: int) -> float:
    """Time of one prompt through an empty cache, the head at its last token included."""

    @jax.jit
    def prompt(params, ids):
        abstract = abstract_cache(cfg, 1, tokens, params["wte"].dtype)
        cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
        hidden, cache = packed.forward(cfg, params, ids, cache, fresh=True)
        return packed.unembed(params, hidden[:, -1]), cache

    ids = jax.random.randint(jax.random.key(3), (1, tokens), 0, cfg.vocab_size)
    jax.block_until_ready(prompt(params, ids))
    times = []
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready(prompt(params, ids))
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def verify_seconds(cfg: ModelConfig, params: dict, context: int, tokens: int) -> float:
    """Time of one pass over `tokens` new tokens of one row, with all their logits."""
    cache = filled_cache(cfg, 1, -(-(context + tokens) // 64) * 64, context, params["wte"].dtype)
    ids = jnp.arange(tokens, dtype=jnp.int32)[None]

    @functools.partial(jax.jit, donate_argnums=1)
    def several(params, cache):
        def one(_, carry):
            cache, total = carry
            hidden, new = packed.forward(cfg, params, ids, cache)
            total = total + packed.unembed(params, hidden).max()
            return new.replace(lengths=cache.lengths), total

        return jax.lax.fori_loop(0, 8, one, (cache, jnp.float32(0)))

    cache, _ = jax.block_until_ready(several(params, cache))
    began = time.perf_counter()
    jax.block_until_ready(several(params, cache))
    return (time.perf_counter() - began) / 8


def main(argv=None):
    args = parse(Args, argv)
    if args.peer:
        batches = [name for name in args.batch if ":" not in name]
        command = [sys.executable, "-m", "benchmarks.decode_peer", "--batch", *batches]
        command += ["--context", str(args.context), "--layers", str(args.layers or 80)]
        subprocess.run(command, check=False)
    runtime.configure()
    config = CONFIGS / f"{args.config}.json"
    cfg = TOY if args.toy else ModelConfig.from_hf(read_json_object(config))
    if args.layers:
        cfg = dataclasses.replace(cfg, num_layers=args.layers)
    print(jax.devices()[0].device_kind, "jax", jax.__version__, flush=True)
    rate = bandwidth()
    print(f"row sums read {rate / 1e12:.2f} TB/s", flush=True)
    if args.check and not args.toy:
        check(cfg)
    if args.toy:
        fmt = QuantFormat.named("int4")
        params = packed.pack_params(init_params(cfg, jax.random.key(0), jnp.float32, fmt))
    else:
        params = random_packed(cfg, args.int8_head)
    jax.block_until_ready(params)
    for name in args.batch:
        print_row(cfg, args, params, name, rate)
    for tokens in (1, args.verify) if args.verify else ():
        seconds = verify_seconds(cfg, params, args.context, tokens)
        print(f"a pass over {tokens} tokens: {seconds * 1e3:.2f} ms", flush=True)
    if args.prefill:
        seconds = prefill_seconds(cfg, params, args.prefill)
        print(f"prefill of {args.prefill} tokens: {seconds:.3f} s", flush=True)


if __name__ == "__main__":
    run(main)
