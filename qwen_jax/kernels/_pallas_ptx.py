"""Words of PTX for the Mosaic GPU bodies that are written one thread at a time.

Such a body is built from MLIR values in plain Python: loops over Python ranges are unrolled, and
each function here adds one instruction (or a few) and returns its results. It knows no kernel.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf

Value = ir.Value


# Such bodies are lowered as they stand, a thread at a time.
LANE = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def of_threads(body: Callable[..., None]) -> Callable[..., None]:
    """The Pallas kernel that body(context, *refs) builds."""

    def kernel(*refs):
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))(body)(*refs)

    # The file's name: what a profile calls it.
    kernel.__name__ = body.__module__.rpartition("_pallas_")[2]
    return kernel


def i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def f32() -> ir.Type:
    return ir.F32Type.get()


def const(value: int) -> Value:
    return arith.constant(i32(), value)


def real(value: float) -> Value:
    return arith.constant(f32(), value)


def add(a: Value, b: Value | int) -> Value:
    return arith.addi(a, arith.constant(a.type, b) if isinstance(b, int) else b)


def mul(a: Value, b: Value | int) -> Value:
    return arith.muli(a, arith.constant(a.type, b) if isinstance(b, int) else b)


def wide(a: Value) -> Value:
    """An unsigned 32-bit number in 64 bits."""
    return arith.extui(i64(), a)


def less(a: Value, b: Value | int) -> Value:
    b = const(b) if isinstance(b, int) else b
    return arith.cmpi(arith.CmpIPredicate.ult, a, b)


def address(ref: Value) -> Value:
    """Where an array starts: 64 bits in device memory, 32 bits in shared memory."""
    pointer = mgpu.utils.memref_ptr(ref)
    shared = pointer.type != llvm.PointerType.get()
    return llvm.ptrtoint(i32() if shared else i64(), pointer)


def asm(text: str, args: Sequence[Value], results: Sequence[ir.Type] = (), *, pure=False) -> Any:
    """Inline PTX: None, one value or a list of values, as `results` has none, one or more types.

    What is not `pure` keeps its order among its like; loads are not pure, or they would sink to
    where their result is used and nothing would be loaded ahead.
    """
    code = {f32(): "f", i32(): "r", i64(): "l"}
    constraints = [f"={code[t]}" for t in results] + [code[a.type] for a in args]
    if not results:
        kind = ir.Type.parse("!llvm.void")
    elif len(results) == 1:
        kind = results[0]
    else:
        kind = llvm.StructType.get_literal(list(results))
    value = llvm.inline_asm(
        kind, list(args), text, ",".join(constraints), has_side_effects=not pure
    )
    if len(results) <= 1:
        return value if results else None
    return [llvm.extractvalue(t, value, [i]) for i, t in enumerate(results)]


def load_word(at: Value) -> Value:
    """One number of 32 bits, such as that of the layer."""
    return asm("ld.global.u32 $0, [$1];", [at], [i32()])


def load_words(at: Value, offset: int) -> list[Value]:
    """16 bytes a lane."""
    return asm(f"ld.global.v4.u32 {{$0,$1,$2,$3}}, [$4+{offset}];", [at], [i32()] * 4)


def load_streamed(at: Value, offset: int) -> list[Value]:
    """16 bytes a lane that are read once: past L1, so that what is read again stays there."""
    text = f"ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {{$0,$1,$2,$3}}, [$4+{offset}];"
    return asm(text, [at], [i32()] * 4)


def load_shared(at: Value, offset: int) -> list[Value]:
    return asm(f"ld.shared.v4.u32 {{$0,$1,$2,$3}}, [$4+{offset}];", [at], [i32()] * 4)


def load_floats(at: Value, offset: int) -> list[Value]:
    """16 bytes a lane of what another kernel has just written."""
    return asm(f"ld.global.v4.f32 {{$0,$1,$2,$3}}, [$4+{offset}];", [at], [f32()] * 4)


def store_bfloat(at: Value, value: Value) -> None:
    asm("{.reg .b16 h; cvt.rn.bf16.f32 h, $1; st.global.b16 [$0], h;}", [at, value])


def larger(value: Value, most: Value) -> Value:
    """The larger of |value| and most."""
    text = "{.reg .f32 a; abs.f32 a, $1; max.f32 $0, a, $2;}"
    return asm(text, [value, most], [f32()], pure=True)


def larger_pair(word: Value, most: Value) -> Value:
    """The larger of the magnitudes of two bfloat16 and of two others, each in a word.

    Without their sign they are in the order of the numbers that their bits are.
    """
    magnitudes = arith.andi(word, const(0x7FFF7FFF))
    return asm("max.u16x2 $0, $1, $2;", [magnitudes, most], [i32()], pure=True)


def fma(a: Value, b: Value, c: Value) -> Value:
    return asm("fma.rn.f32 $0, $1, $2, $3;", [a, b, c], [f32()], pure=True)


def total(values: Sequence[Value]) -> Value:
    result = values[0]
    for value in values[1:]:
        result = arith.addf(result, value)
    return result


def rounded(value: Value) -> Value:
    """float32 to bfloat16 and back."""
    text = "{.reg .b16 h, z; mov.b16 z, 0; cvt.rn.bf16.f32 h, $1; mov.b32 $0, {z, h};}"
    return asm(text, [value], [f32()], pure=True)


def exp2(a: Value) -> Value:
    return asm("ex2.approx.ftz.f32 $0, $1;", [a], [f32()], pure=True)


def inverse(a: Value) -> Value:
    return asm("rcp.approx.ftz.f32 $0, $1;", [a], [f32()], pure=True)


def inverse_root(a: Value) -> Value:
    return asm("rsqrt.approx.ftz.f32 $0, $1;", [a], [f32()], pure=True)


def turn_8x8(word: Value) -> Value:
    """A piece [8, 8] of 16-bit values, of which lane l has row l / 4 and there the pair l mod 4,
    transposed.
    """
    return asm("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", [word], [i32()], pure=True)


def mma_16x8x16(sums: list[Value], a: list[Value], b: list[Value]) -> list[Value]:
    """sums [16, 8] float32 += a [16, 16] @ b [16, 8] in bfloat16, spread over a warp."""
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )
    return asm(text, [*a, *b, *sums], [f32()] * 4, pure=True)


def halves(word: Value) -> list[Value]:
    """Two float16 of a word -> two float32."""
    text = "{.reg .b16 lo, hi; mov.b32 {lo, hi}, $2; cvt.f32.f16 $0, lo; cvt.f32.f16 $1, hi;}"
    return asm(text, [word], [f32()] * 2, pure=True)


def bfloats(word: Value) -> list[Value]:
    """Two bfloat16 of a word -> two float32."""
    low = arith.shli(word, const(16))
    high = arith.andi(word, const(-65536))
    return [arith.bitcast(f32(), low), arith.bitcast(f32(), high)]


def int8s(word: Value) -> list[Value]:
    """Four int8 of a word -> four float32: a byte in the mantissa of 2^23 reads 2^23 + byte."""
    flipped = arith.xori(word, const(-0x7F7F7F80))  # 0x80808080: signed to unsigned, + 128
    values = []
    for i in range(4):
        text = f"prmt.b32 $0, $1, $2, {0x7440 + i};"
        bits = asm(text, [flipped, const(0x4B000000)], [i32()], pure=True)
        values.append(arith.subf(arith.bitcast(f32(), bits), real(8388736.0)))
    return values


@contextlib.contextmanager
def when(condition: Value):
    with mgpu.utils.when(condition):
        yield


def loop(start: Value, stop: Value, step: Value | int, state: Any, body) -> Any:
    """`state = body(index, state)` while index < stop; state is a pytree of values."""
    step = const(step) if isinstance(step, int) else step
    leaves, tree = jax.tree.flatten(state)
    op = scf.ForOp(start, stop, step, leaves)
    with ir.InsertionPoint(op.body):
        inner = jax.tree.unflatten(tree, list(op.inner_iter_args))
        scf.yield_(jax.tree.leaves(body(op.induction_variable, inner)))
    return jax.tree.unflatten(tree, list(op.results))


def thread() -> tuple[Value, Value, Value]:
    """Index of this thread in its block, its lane, and its warp (known to be uniform)."""
    index = mgpu.utils.thread_idx()
    return index, arith.andi(index, const(31)), mgpu.utils.warp_idx(sync=True)


def block() -> Value:
    return arith.index_cast(i32(), gpu.block_id(gpu.Dimension.x))


def barrier() -> None:
    """Waits for all threads of the block."""
    gpu.barrier()


def over_block(
    combine: Callable[[Value, Value], Value],
    values: Sequence[Value],
    warps: int,
    smem: Value,  # float32, at least one a value and warp
) -> list[Value]:
    """Each float32 combined over all threads of the block, in each of them."""
    base, (_, lane, warp) = address(smem), thread()
    for i, value in enumerate(values):
        for distance in (1, 2, 4, 8, 16):
            value = combine(value, swap(value, distance))
        with when(less(lane, 1)):
            at = add(base, mul(add(warp, i * warps), 4))
            asm("st.shared.f32 [$0], $1;", [at, value])
    barrier()
    results = []
    for i in range(len(values)):
        ats = [add(base, 4 * (i * warps + other)) for other in range(warps)]
        parts = [asm("ld.shared.f32 $0, [$1];", [at], [f32()]) for at in ats]
        results.append(functools.reduce(combine, parts))
    return results


def cluster_barrier() -> None:
    """Waits for all threads of the cluster; what they wrote to shared memory can then be read."""
    asm("barrier.cluster.arrive.release.aligned;", [])
    asm("barrier.cluster.wait.acquire.aligned;", [])


def load_remote(at: Value, rank: Value) -> Value:
    """A float32 from the shared memory of another block of the cluster."""
    text = "{.reg .b32 a; mapa.shared::cluster.u32 a, $1, $2; ld.shared::cluster.f32 $0, [a];}"
    return asm(text, [at, rank], [f32()])


def swap(value: Value, distance: int) -> Value:
    """The value of the lane whose number differs in the bit `distance`."""
    return mgpu.utils.shfl_bfly(value, distance)
