"""The peer of benchmarks.decode: gpt-fast's recipe in PyTorch, at the same width, random weights.

    python -m benchmarks.decode_peer --layers 80 --batch 1 4 --context 1024

int4 weights in groups of 128 through `_weight_int4pack_mm` (tinygemm), a compiled block, a static
cache of 2,048 slots, the whole step in one CUDA graph, the likeliest token taken. Runs in a process
of its own: JAX keeps the card's memory.
"""

import dataclasses
import json
import time

import torch
import torch.nn.functional as F

from qwen_jax.cli import parse, run

D, FFN, N, H, V = 8192, 24576, 64, 128, 152064
GROUP, SLOTS = 128, 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Times gpt-fast's int4 recipe at the shape of Qwen-72B."""

    layers: int = 80
    batch: tuple[int, ...] = (1,)
    context: int = 1024
    steps: int = 30


def int4_weight(out: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.randint(0, 256, (out, size // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.full((size // GROUP, out, 2), 0.0043, dtype=torch.bfloat16, device="cuda")
    scales[..., 1] = 0
    return packed, scales


def product(x: torch.Tensor, weight: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1])
    y = torch.ops.aten._weight_int4pack_mm(flat, weight[0], GROUP, weight[1])
    return y.reshape(*x.shape[:-1], -1)


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.float().chunk(2, dim=-1)
    y = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return y.to(x.dtype)


def block(x, wqkv, wo, up, gate, down, k_cache, v_cache, slot, mask, cos, sin):
    """x [B, 1, D]; caches [B, N, SLOTS, H], written at `slot`."""
    B = x.shape[0]
    q, k, v = product(rms_norm(x), wqkv).reshape(B, 1, 3, N, H).unbind(2)
    q, k, v = (y.transpose(1, 2) for y in (rotate(q, cos, sin), rotate(k, cos, sin), v))
    k_cache.index_copy_(2, slot, k)
    v_cache.index_copy_(2, slot, v)
    y = F.scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=mask)
    x = x + product(y.transpose(1, 2).reshape(B, 1, -1), wo)
    y = rms_norm(x)
    return x + product(product(y, up) * F.silu(product(y, gate)), down)


def make_step(layers, caches, head, embedding, token, slot, compiled):
    def step():
        x = embedding[token]  # [B, 1, D]
        mask = (torch.arange(SLOTS, device="cuda") <= slot)[None, None, None]
        angle = slot.float() * 10000.0 ** (-torch.arange(H // 2, device="cuda") / (H // 2))
        for weights, (k, v) in zip(layers, caches, strict=True):
            x = compiled(x, *weights, k, v, slot, mask, angle.cos(), angle.sin())
        token.copy_((rms_norm(x) @ head.T).argmax(-1))
        slot.add_(1)

    return step


def measure(args: Args, batch: int, layers, head, embedding) -> dict:
    caches = [
        tuple(torch.randn(batch, N, SLOTS, H, dtype=torch.bfloat16, device="cuda") for _ in "kv")
        for _ in range(args.layers)
    ]
    token = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
    slot = torch.tensor([args.context], device="cuda")
    torch._dynamo.reset()
    step = make_step(layers, caches, head, embedding, token, slot, torch.compile(block))
    began = time.perf_counter()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    compile_seconds = time.perf_counter() - began
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    slot.fill_(args.context)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(args.steps):
        graph.replay()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / args.steps
    return {
        "peer": "gpt-fast int4 recipe, torch " + torch.__version__,
        "batch": batch,
        "tok/s": round(batch / seconds, 1),
        "ms/step": round(seconds * 1e3, 2),
        "peak GB": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        "compile s": round(compile_seconds, 1),
    }


def main(argv=None):
    args = parse(Args, argv)
    torch.manual_seed(0)
    shapes = ((3 * N * H, D), (D, N * H), (FFN, D), (FFN, D), (D, FFN))
    with torch.inference_mode():
        layers = [tuple(int4_weight(*shape) for shape in shapes) for _ in range(args.layers)]
        head = torch.randn(V, D, dtype=torch.bfloat16, device="cuda") * 0.02
        embedding = torch.randn(V, D, dtype=torch.bfloat16, device="cuda") * 0.02
        for batch in args.batch:
            print(json.dumps(measure(args, batch, layers, head, embedding)), flush=True)


if __name__ == "__main__":
    run(main)
