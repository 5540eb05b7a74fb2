"""The bodies of the decode kernels, interpreted on the CPU, against their references."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ptx_interpreter import Launch, interpreted
from tiny import random_stack

from qwen_jax.kernels import _pallas_append_tokens as append_body
from qwen_jax.kernels import _pallas_decode_attention as attention_body
from qwen_jax.kernels import _pallas_ptx as ptx
from qwen_jax.kernels import _pallas_qmatmul as qmatmul_body
from qwen_jax.kernels import _pallas_quantize_rows as rows_body
from qwen_jax.kernels import _pallas_residual_norm as norm_body
from qwen_jax.kernels import _pallas_rms_norm as training_norm
from qwen_jax.kernels import _pallas_swiglu as swiglu_body
from qwen_jax.kernels import _pallas_swiglu_low as low_body
from qwen_jax.kernels import _pallas_unpack as unpack_body
from qwen_jax.kernels.append_tokens import append_tokens_xla
from qwen_jax.kernels.decode_attention import decode_attention_xla
from qwen_jax.kernels.packing import pack, pack_layer
from qwen_jax.kernels.quantize_rows import quantize_rows_xla
from qwen_jax.kernels.residual_norm import residual_norm_xla
from qwen_jax.kernels.rms_norm import rms_norm
from qwen_jax.kernels.swiglu import swiglu_gradient_xla, swiglu_narrow
from qwen_jax.kernels.unpack import unpack
from qwen_jax.quant import QuantFormat, dequantize, group_scales, quantize, quantize_heads

BF16, FP8 = np.dtype(jnp.bfloat16), np.dtype(jnp.float8_e4m3fn)
SHARED = ("shared", 512)


def normal(seed, shape, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def relative_error(a, b) -> float:
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def layer_of(seed, kind, N, size):
    """A packed layer, its codes and scale, and the weight [N, size] that it stands for."""
    w = jnp.asarray(normal(seed, (N, size)))
    if kind == "bf16":
        w = w.astype(jnp.bfloat16)
        return *pack_layer(w, None, kind), w
    q = quantize(w, QuantFormat.named(kind))
    return *pack_layer(q.data, group_scales(q), kind), dequantize(q, jnp.float32)


@pytest.mark.parametrize(
    ("kind", "M", "size", "cut"),
    [
        (kind, *case)
        for kind in ("int4", "nf4", "int8", "bf16")
        for case in (
            (1, 1024, (1, 4, 1, 8)),
            (8, 1024, (2, 4, 2, 4)),
            (3, 1024, (1, 4, 2, 2)),
            (16, 640, (1, 8, 1, 4)),
        )
    ]
    + [
        ("bf16", 2, 200, (3, 4, 2, 4)),
        ("bf16", 9, 600, (1, 4, 5, 8)),
        ("bf16", 32, 384, (1, 4, 3, 4)),
    ],
)
def test_products(monkeypatch, kind, M, size, cut):
    """Inputs are padded to whole chunks; the output has NaN where nothing was written."""
    blocks, warps, splits, ahead = cut
    tiling = qmatmul_body.Tiling(blocks=blocks, warps=warps, splits=splits, ahead=ahead)
    fmt, N = qmatmul_body.FORMATS[kind], 2 * tiling.rows
    layers = [layer_of(i, kind, N, size) for i in range(2)]
    codes = np.stack([np.asarray(layer[0]) for layer in layers])
    K = codes.shape[2] * fmt.unit
    tiling.check(N, K, fmt.chunk)
    x = np.zeros((M, K), BF16)
    x[:, :size] = normal(5, (M, size), BF16)
    body = qmatmul_body._Body(M=M, N=N, K=K, tiling=tiling, fmt=fmt)
    launch = Launch(N // tiling.rows * splits, warps * 32, body.smem_bytes + 512)
    refs = [launch.array(a) for a in (np.array([1], np.int32), x, codes)]
    if fmt.scale_loads:
        refs.append(launch.array(np.stack([np.asarray(layer[1]) for layer in layers])))
    if kind == "nf4":
        refs.append(launch.array(qmatmul_body._nf4_pairs()))
    out = launch.array(np.full((splits, M, N), np.nan, np.float32))
    with interpreted(launch, monkeypatch, qmatmul_body):
        body(None, *refs, out, SHARED)
    got = launch.read(out).sum(0)
    _, scale, dense = layers[1]
    if kind == "int8":
        got = got * np.asarray(scale)
    want = x[:, :size].astype(np.float64) @ np.asarray(dense, np.float64).T
    # nf4's table holds bfloat16 values and its scales are float16; the others are exact.
    assert relative_error(got, want) < (3e-3 if kind == "nf4" else 1e-5)


def stacks_of(quantized, L, B, S, N):
    stacks = [jnp.asarray(normal(i, (L, B, S, N, 128)), jnp.bfloat16) for i in (1, 2)]
    if not quantized:
        return [*stacks, None, None]
    pairs = [quantize_heads(x) for x in stacks]
    return [codes for codes, _ in pairs] + [scale for _, scale in pairs]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("warps", "splits"), [(4, 1), (8, 1), (4, 2)])
def test_attention_at_many_lengths(monkeypatch, quantized, warps, splits):
    L, B, S, N, R = 2, 2, 150, 2, 6
    q = normal(0, (R, N, 128), BF16)
    stacks = stacks_of(quantized, L, B, S, N)
    visible = np.array([1, 8, 9, 64, 65, 150], np.int32)
    body = attention_body.Body(B=B, S=S, N=N, R=R, quantized=quantized, warps=warps, splits=splits)
    shared = (warps + 1) * attention_body.PART * 4
    launch = Launch(R * N * splits, warps * 32, shared + 512, splits)
    arrays = [
        np.array([1], np.int32),
        visible,
        q,
        *(np.asarray(s) for s in stacks if s is not None),
    ]
    refs = [launch.array(a) for a in arrays]
    out = launch.array(np.full((R, N, 128), np.nan, BF16))
    with interpreted(launch, monkeypatch, attention_body):
        body(None, *refs, out, SHARED)
    want = decode_attention_xla(
        jnp.asarray(q, jnp.float32), *stacks, jnp.int32(1), jnp.asarray(visible)
    )
    assert relative_error(launch.read(out), want) < 4e-3  # the rounding of the result to bfloat16


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_tokens_written_into_the_cache(monkeypatch, quantized, tokens):
    L, B, S, N, P = 2, 4, 70, 3, 3  # three heads do not fill the last block
    R = B * tokens
    stacks = stacks_of(quantized, L, B, S, N)
    parts = normal(3, (P, R, 3 * N * 128))
    bias = normal(5, (L, 3, N, 128), BF16)
    angle = np.random.default_rng(4).uniform(size=(R, 64)) * 6
    angles = np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    factor = np.linspace(1, 1.3, R, dtype=np.float32)
    # The last row is full: nothing of it is written.
    slots = (np.array([0, 1, 69 - tokens, 70])[:, None] + np.arange(tokens)).reshape(R)
    slots = slots.astype(np.int32)
    body = append_body.Body(B=B, S=S, N=N, R=R, P=P, quantized=quantized)
    launch = Launch(body.blocks, 128, 0)
    arrays = [np.array([1], np.int32), slots, parts, bias, angles, factor]
    refs = [launch.array(a) for a in arrays]
    caches = [launch.array(np.asarray(s)) for s in stacks if s is not None]
    out = launch.array(np.full((R, N, 128), np.nan, BF16))
    with interpreted(launch, monkeypatch, append_body):
        body(None, *refs, *caches, out)
    want, written = append_tokens_xla(
        jnp.asarray(parts), jnp.asarray(bias), jnp.asarray(angles[:, :64]),
        jnp.asarray(angles[:, 64:]), jnp.asarray(factor), tuple(stacks), jnp.int32(1),
        jnp.asarray(slots),
    )  # fmt: skip
    # A product that is fused with a sum may round the other way: one step of bfloat16.
    assert relative_error(launch.read(out), want) < 1e-3
    for ref, reference in zip(caches, [x for x in written if x is not None], strict=True):
        got, reference = (np.asarray(x, np.float32) for x in (launch.read(ref), reference))
        assert (got != reference).mean() < 1e-3
        np.testing.assert_allclose(got, reference, rtol=2**-7, atol=1.0 if quantized else 1e-6)


@pytest.mark.parametrize("D", [512, 1536, 8192])
def test_residual_and_norm(monkeypatch, D):
    M, P = 3, 2
    x, parts = normal(0, (M, D), BF16), normal(1, (P, M, D))
    weight = normal(2, (2, D), BF16)
    splits = next(s for s in (8, 4, 2, 1) if D % (512 * s) == 0)
    threads = D // (4 * splits)
    body = norm_body._Body(P=P, M=M, D=D, splits=splits, threads=threads, eps=1e-6)
    launch = Launch(M * splits, threads, 256 + 512, splits)
    refs = [launch.array(a) for a in (np.array([1], np.int32), x, parts, weight)]
    outs = [launch.array(np.full((M, D), np.nan, BF16)) for _ in range(2)]
    with interpreted(launch, monkeypatch, norm_body):
        body(None, *refs, *outs, SHARED)
    want = residual_norm_xla(*map(jnp.asarray, (x, parts, weight)), jnp.int32(1), 1e-6)
    np.testing.assert_array_equal(launch.read(outs[0]), np.asarray(want[0]))
    assert relative_error(launch.read(outs[1]), want[1]) < 2e-3


@pytest.mark.parametrize(("N", "size"), [(64, 256), (512, 160), (32, 1024)])
def test_bfloat16_weights_back_in_rows(monkeypatch, N, size):
    """Bit for bit, every value that was packed; padding is not written, and NaN would be seen."""
    weights = [normal(i, (N, size), BF16) for i in range(2)]
    codes = np.stack([np.asarray(pack_layer(jnp.asarray(w), None, "bf16")[0]) for w in weights])
    body = unpack_body.Body(N=N, K=codes.shape[2] * 16, I=size).checked()
    launch = Launch(body.blocks, 256, 0)
    refs = [launch.array(a) for a in (np.array([1], np.int32), codes)]
    out = launch.array(np.full((N, size), np.nan, BF16))
    with interpreted(launch, monkeypatch, unpack_body):
        body(None, *refs, out)
    np.testing.assert_array_equal(launch.read(out), weights[1])


def test_sizes_that_bfloat16_is_not_unpacked_in():
    for N, size in ((64, 264), (16, 256), (64, 1024)):
        with pytest.raises(NotImplementedError, match=f"unpacking {N} x {size}"):
            unpack_body.Body(N=N, K=512, I=size).checked()


@pytest.mark.parametrize(("kind", "dtype"), [("int4", jnp.bfloat16), ("bf16", jnp.float32)])
def test_the_unpacking_kernel_refuses_what_it_would_misread(kind, dtype):
    w = pack(random_stack(0, kind, 2, 64, 512))
    with pytest.raises(NotImplementedError, match=f"unpacking {kind}"):
        unpack(w, jnp.int32(0), dtype, implementation="mosaic")


@pytest.mark.parametrize("K", [2048, 6144])
def test_rows_to_e4m3(monkeypatch, K):
    x = normal(0, (3, K), BF16)
    x[1] *= 300
    x[2] = 0
    launch = Launch(3, 256, 32 + 512)
    refs = [launch.array(x)]
    outs = [
        launch.array(np.full((3, K), np.nan, jnp.float8_e4m3fn)),
        launch.array(np.full(3, np.nan, np.float32)),
    ]
    with interpreted(launch, monkeypatch, rows_body):
        rows_body.Body(K=K)(None, *refs, *outs, SHARED)
    exact = x.astype(np.float64)
    unit = np.maximum(np.abs(exact).max(axis=1), 1e-30) / 448
    want = (exact / unit[:, None]).astype(jnp.float8_e4m3fn).astype(np.float32)
    np.testing.assert_allclose(launch.read(outs[1]), unit, rtol=1e-6)
    np.testing.assert_array_equal(launch.read(outs[0]).astype(np.float32), want)
    # The reference divides by a rounded unit: now and then that crosses the edge of two codes.
    codes, steps = quantize_rows_xla(jnp.asarray(x))
    np.testing.assert_allclose(steps, unit, rtol=1e-6)
    assert (np.asarray(codes, np.float32) != want).mean() < 1e-3


@pytest.mark.parametrize(
    ("M", "F", "R"), [(384, 1024, 8), (256, 384, 16), (128, 256, 8), (128, 512, 16)]
)
def test_gradient_of_swiglu(monkeypatch, M, F, R):
    """Blocks along both axes; layer 1 of one stack and 0 of another."""
    shapes = [(2, M, F), (1, M, F), (M, F), (R, F), (R, F), (3, M, R)]
    inputs = [normal(i, shape, jnp.bfloat16) for i, shape in enumerate(shapes)]
    up, gate, g, *bs, narrow = (jnp.asarray(x) for x in inputs)
    want = swiglu_gradient_xla(up[1], gate[0], g, bs, narrow[:2], narrow[2])

    body = swiglu_body.check(M, F, {R})
    launch = Launch(body.across * body.down, 32 * body.warps, 4 * body.shared_floats)
    outs = [(M, F), (M, F), (body.across, 2, M, R), (body.down, 3, F, R)]
    kinds = [BF16, BF16, np.float32, np.float32]
    outs = [launch.array(np.full(s, np.nan, k)) for s, k in zip(outs, kinds, strict=True)]
    refs = [launch.array(x) for x in inputs[:5]]
    turned = launch.array(np.ascontiguousarray(np.swapaxes(inputs[5], 1, 2)))
    index = launch.array(np.array([1, 0], np.int32))
    with interpreted(launch, monkeypatch, swiglu_body):
        body(None, index, *refs, turned, *outs, ("shared", 0))
    of_up, of_gate, slopes, pairs = (launch.read(out).astype(np.float64) for out in outs)
    slopes, pairs = slopes.sum(0), np.swapaxes(pairs.sum(0), 1, 2)
    ours = (of_up, of_gate, *slopes, *pairs)
    # Both round a sum to 8 bits, or an operand of it one step apart.
    for a, b in zip(ours, jax.tree.leaves(want), strict=True):
        assert relative_error(a, b) < 2**-8


@pytest.mark.parametrize("dtype", [BF16, FP8, None])
@pytest.mark.parametrize(("M", "F", "R", "across"), [(16, 3840, 8, 3), (24, 384, 16, 1)])
def test_swiglu_with_its_narrow_product(monkeypatch, M, F, R, across, dtype):
    """Layer 1 of one stack and 0 of another; h where it is wanted."""
    inputs = swiglu_inputs(M, F, R)
    up, gate, a = (jnp.asarray(x) for x in inputs)
    want = swiglu_narrow(up[1], gate[0], a, a.dtype, implementation="xla")
    low, *made = run_swiglu_low(monkeypatch, inputs, dtype, across)
    assert relative_error(low, want.low) < 2**-8
    h = np.asarray(want.h, np.float32)
    if dtype == BF16:
        assert (made[0] == h).mean() > 0.99  # the order of two multiplications may round away
        assert relative_error(made[0], h) < 2**-9
    if dtype == FP8:
        codes, unit = quantize_rows_xla(want.h)
        np.testing.assert_allclose(made[1], unit, rtol=2**-7)
        assert relative_error(made[0] * made[1][:, None], h) < 2**-4
        assert (made[0] == np.asarray(codes, np.float32)).mean() > 0.98


def test_rows_of_swiglu_that_are_no_numbers_are_no_others(monkeypatch):
    """Zeros, NaN, infinity, and what a float32 cannot hold."""
    up, gate, a = swiglu_inputs(16, 1024, 8)
    up[1, 0] = 0
    up[1, 1, 5] = np.nan
    up[1, 2, 7] = np.inf
    up[1, 3], gate[0, 3] = 1e-30, 1e-20
    up[1, 4] *= 1e30
    gate[0, 4] = 3e38
    gate[0, 5] = -200
    with np.errstate(all="ignore"):
        low, codes, unit = run_swiglu_low(monkeypatch, (up, gate, a), FP8, 1)
        want = swiglu_narrow(*map(jnp.asarray, (up[1], gate[0], a)), BF16, implementation="xla")
        their_codes, their_unit = (np.asarray(x, np.float32) for x in quantize_rows_xla(want.h))
    np.testing.assert_allclose(unit, their_unit, rtol=2**-7)
    np.testing.assert_array_equal(np.isnan(codes), np.isnan(their_codes))
    np.testing.assert_array_equal(np.isnan(low), np.isnan(np.asarray(want.low, np.float32)))
    assert (
        np.isnan(codes).any(axis=1).sum() >= 3 and not np.isnan(codes[[0, 3, *range(5, 16)]]).any()
    )
    for row in (0, 3, 5):
        np.testing.assert_array_equal(codes[row], 0)
    assert relative_error(codes[6:], their_codes[6:]) < 2**-4


def swiglu_inputs(M, F, R):
    return [normal(i, s, jnp.bfloat16) for i, s in enumerate([(2, M, F), (1, M, F), (R, F)])]


def run_swiglu_low(monkeypatch, inputs, dtype, across):
    """The narrow product, h if it is wanted, its unit if it is in e4m3."""
    (_, M, F), R = inputs[0].shape, len(inputs[2])
    body = dataclasses.replace(low_body.check(M, F, R, rounds=True), dtype=dtype)
    assert body.across == across
    launch = Launch(
        M // 8 * across, 32 * body.warps, 4 * body.shared_floats, across if body.rounds else 1
    )
    shapes = [((across, M, R), np.float32)]
    shapes += [((M, F), dtype)] if dtype else []
    shapes += [((M,), np.float32)] if body.rounds else []
    outs = [
        launch.array(np.full(*of)) for of in ((s, 0 if k == FP8 else np.nan, k) for s, k in shapes)
    ]
    refs = [launch.array(x) for x in (np.array([1, 0], np.int32), *inputs)]
    with interpreted(launch, monkeypatch, low_body, swiglu_body):
        body(None, *refs, *outs, ("shared", 0))
    low, *made = (launch.read(out).astype(np.float32) for out in outs)
    return low.sum(0), *made


@pytest.mark.parametrize(("D", "added", "readers"), [(1024, False, 1), (6144, True, 2)])
def test_rms_norm_and_its_gradient(monkeypatch, D, added, readers):
    """Layer 1 of two."""
    M, eps = 3, 1e-6
    names = ["x", *(["y"] if added else []), "of_total", *["of_norm"] * readers]
    inputs = [normal(i, (M, D), jnp.bfloat16) for i in range(len(names))]
    weight = normal(9, (D,), jnp.bfloat16)
    wide = [jnp.asarray(x, jnp.float32) for x in inputs]
    of_total, *of_norms = wide[1 + added :]
    total = jnp.asarray(sum(inputs[: 1 + added])).astype(jnp.float32)  # rounded, as x + y is
    _, pullback = jax.vjp(lambda x: rms_norm(x, jnp.asarray(weight, jnp.float32), eps), total)
    want = of_total + pullback(sum(of_norms))[0]
    rows = {"M": M, "D": D, "values": training_norm.check(D)}
    shape = rows | {"eps": eps, "added": added}

    def run(body, arrays, outs=1):
        launch = Launch(M, body.threads, 8 * body.threads // 32)
        stacks = [in_stack(x, i) for x, i in zip(arrays[: 1 + added], (1, 2), strict=False)]
        refs = [*stacks, *arrays[1 + added :], weight]
        refs = [launch.array(x) for x in (np.array([1, 2], np.int32), *refs)]
        made = [launch.array(np.full((M, D), np.nan, BF16)) for _ in range(outs)]
        with interpreted(launch, monkeypatch, training_norm):
            body(None, *refs, *made, ("shared", 0))
        return [launch.read(out).astype(np.float32) for out in made]

    exact = rms_norm(jnp.asarray(total, jnp.bfloat16), jnp.asarray(weight), eps)
    for with_total in (False, True) if added else (False,):
        body = training_norm.Norm(**shape, total=with_total)
        norm, *sums = run(body, inputs[: 1 + added], 1 + with_total)
        # An ulp of rsqrt may round away.
        assert (norm == np.asarray(exact, np.float32)).mean() > 0.99
        for of_both in sums:
            np.testing.assert_array_equal(of_both, total)
    (gradient,) = run(training_norm.Gradient(**shape, readers=readers), inputs)
    assert relative_error(gradient, want) < 2**-8


def in_stack(x, layer: int):
    """Of four layers; the others are NaN."""
    return np.stack([x if i == layer else np.full_like(x, np.nan) for i in range(4)])


@pytest.mark.parametrize("D", [1024, 10240])
def test_sum_behind_a_layer(monkeypatch, D):
    """Nothing else of the stack changes."""
    M = 3
    x, y = (normal(i, (M, D), jnp.bfloat16) for i in range(2))
    before = normal(2, (4, M, D), jnp.bfloat16)
    body = training_norm.Sum(M=M, D=D, values=training_norm.check(D))
    launch = Launch(M, body.threads, 0)
    index, *refs = (launch.array(a) for a in (np.array([2], np.int32), x, y, before))
    with interpreted(launch, monkeypatch, training_norm):
        body(None, index, *refs)
    want = before.copy()
    want[2] = np.asarray(jnp.asarray(x) + jnp.asarray(y))
    np.testing.assert_array_equal(launch.read(refs[-1]).astype(np.float32), want.astype(np.float32))


def test_reads_outside_an_array_are_seen(monkeypatch):
    launch = Launch(1, 32, 0)
    ref = launch.array(np.zeros(31, np.float32))
    with interpreted(launch, monkeypatch):
        at = ptx.add(ptx.address(ref), ptx.mul(ptx.wide(ptx.thread()[0]), 4))
        with pytest.raises(AssertionError, match="outside every array"):
            ptx.asm("ld.global.f32 $0, [$1];", [at], [ptx.f32()])
    assert jax.default_backend()  # the real words are back
