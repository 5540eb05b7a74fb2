"""Runs the bodies of kernels on the CPU: every PTX word done by numpy, for all threads.

A value is an array with one element a thread of the whole launch; threads go in step, so barriers
hold by themselves and races are not seen. What is seen: every address (an access outside an array
fails), every index, every rounding, every exchange between lanes, warps and blocks.
"""

import contextlib
import re

import jax
import ml_dtypes
import numpy as np

from qwen_jax.kernels import _pallas_ptx as ptx

U32, U64, F32 = np.uint32, np.uint64, np.float32
_GUARD = 4096


class Arith:
    """The operations of the arith dialect that the bodies use."""

    CmpFPredicate = type("P", (), {"OEQ": "=="})
    CmpIPredicate = type("P", (), {"eq": "=="})

    addf = staticmethod(lambda a, b: a + b)
    subf = staticmethod(lambda a, b: a - b)
    mulf = staticmethod(lambda a, b: a * b)
    divf = staticmethod(lambda a, b: a / b)
    maximumf = staticmethod(np.maximum)
    andi = staticmethod(lambda a, b: a & b)
    ori = staticmethod(lambda a, b: a | b)
    xori = staticmethod(lambda a, b: a ^ b)
    shli = staticmethod(lambda a, b: a << b)
    shrui = staticmethod(lambda a, b: a >> b)
    divui = staticmethod(lambda a, b: a // b)
    remui = staticmethod(lambda a, b: a % b)
    minui = staticmethod(np.minimum)
    select = staticmethod(np.where)
    cmpi = staticmethod(lambda how, a, b: a == b)
    cmpf = staticmethod(lambda how, a, b: a == b)
    bitcast = staticmethod(lambda kind, a: a.view(kind))
    sitofp = staticmethod(lambda kind, a: a.view(np.int32).astype(kind))
    maxsi = staticmethod(lambda a, b: np.maximum(a.view(np.int32), b.view(np.int32)).view(U32))
    minsi = staticmethod(lambda a, b: np.minimum(a.view(np.int32), b.view(np.int32)).view(U32))


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16, in uint32."""
    return x.astype(ml_dtypes.bfloat16).view(np.uint16).astype(U32)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return ((bits & 0xFFFF).astype(U32) << 16).view(F32)


class Launch:
    """A grid of thread blocks, their shared memory, and arrays in device memory."""

    def __init__(self, blocks: int, threads: int, shared: int, cluster: int = 1):
        self.count, self.threads, self.cluster = blocks * threads, threads, cluster
        self.index = np.arange(self.count)
        self.shared = np.full((blocks, shared + 1024), 0xFF, np.uint8)  # NaN until written
        self.memory, self.valid, self.refs = np.zeros(0, np.uint8), np.zeros(0, bool), []
        self.masks = [np.ones(self.count, bool)]

    def array(self, data: np.ndarray):
        """Puts an array into device memory; the result stands for a Ref."""
        raw = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
        at = -(-(self.memory.size + _GUARD) // 256) * 256
        rest = at - self.memory.size
        before, after = np.zeros(rest, np.uint8), np.zeros(_GUARD, np.uint8)
        real = np.ones(raw.size, bool)
        self.memory = np.concatenate([self.memory, before, raw, after])
        self.valid = np.concatenate([self.valid, before > 0, real, after > 0])
        ref = ("global", at, data.shape, data.dtype)
        self.refs.append(ref)
        return ref

    def read(self, ref) -> np.ndarray:
        _, at, shape, dtype = ref
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.memory[at : at + size].view(dtype).reshape(shape)

    @property
    def active(self) -> np.ndarray:
        return np.logical_and.reduce(self.masks)

    # -- memory ---------------------------------------------------------------------------------
    def _bytes(self, at: np.ndarray, size: int, active: np.ndarray) -> np.ndarray:
        where = at.astype(np.int64)[:, None] + np.arange(size)
        where = np.where(active[:, None], where, 0)
        return where

    def load(self, at, size, block=None):
        active = self.active
        where = self._bytes(at, size, active)
        if at.dtype == U64:
            assert self.valid[where[active]].all(), "a read outside every array"
            return self.memory[where]
        assert (where[active] < self.shared.shape[1]).all(), "a read outside shared memory"
        block = self.index // self.threads if block is None else block
        return self.shared[block[:, None], where]

    def store(self, at, data: np.ndarray):
        active = self.active
        where = self._bytes(at, data.shape[1], active)[active]
        if at.dtype == U64:
            assert self.valid[where].all(), "a write outside every array"
            self.memory[where] = data[active]
            return
        assert (where < self.shared.shape[1]).all(), "a write outside shared memory"
        self.shared[(self.index // self.threads)[active][:, None], where] = data[active]

    # -- what takes the place of the functions in _pallas_ptx ------------------------------------
    def const(self, value):
        return np.full(self.count, value & 0xFFFFFFFF, U32)

    def real(self, value):
        return np.full(self.count, value, F32)

    @staticmethod
    def add(a, b):
        return a + (np.asarray(b).astype(a.dtype) if isinstance(b, int) else b)

    @staticmethod
    def mul(a, b):
        return a * (np.asarray(b).astype(a.dtype) if isinstance(b, int) else b)

    @staticmethod
    def less(a, b):
        return a < b

    def address(self, ref):
        kind = U64 if ref[0] == "global" else U32
        return np.full(self.count, ref[1], kind)

    def thread(self):
        index = (self.index % self.threads).astype(U32)
        return index, index % U32(32), index // U32(32)

    def block(self):
        return (self.index // self.threads).astype(U32)

    @contextlib.contextmanager
    def when(self, condition):
        self.masks.append(condition)
        yield
        self.masks.pop()

    def loop(self, start, stop, step, state, body):
        index = start.copy()
        while True:
            inside = self.active & (index.view(np.int32) < stop.view(np.int32))
            if not inside.any():
                return state
            self.masks.append(inside)
            new = body(index, state)
            self.masks.pop()
            state = jax.tree.map(lambda n, o: np.where(inside, n, o), new, state)  # noqa: B023
            index = np.where(inside, index + U32(step), index)

    def swap(self, value, distance):
        lanes = np.arange(32) ^ distance
        return value.reshape(-1, 32)[:, lanes].reshape(-1)

    def asm(self, text, args, results=(), *, pure=False):
        with np.errstate(all="ignore"):
            out = self._word(text.strip(), args)
        if not results:
            return None
        assert len(out) == len(results), text
        assert all(value.dtype == kind for value, kind in zip(out, results, strict=True)), text
        return out[0] if len(results) == 1 else out

    def _word(self, text: str, args) -> list[np.ndarray] | None:
        match = re.match(r"ld\.(global|shared)[.\w:]*?(\.v[24])?\.(u32|f32) ", text)
        if match:
            place, offset = re.search(r"\[\$(\d+)\+?(\d*)\]", text).groups()
            width = int(match[2][2:]) if match[2] else 1
            assert int(place) == width
            at = self.add(args[0], int(offset or 0))
            words = self.load(at, 4 * width).reshape(-1, width, 4)
            words = np.ascontiguousarray(words).view(U32 if match[3] == "u32" else F32)
            return [np.ascontiguousarray(words[:, i, 0]) for i in range(width)]
        match = re.match(r"st\.(global|shared)(\.v[24])?\.(u32|f32) \[\$0\+?(\d*)\]", text)
        if match:
            words = [np.ascontiguousarray(a).view(np.uint8).reshape(-1, 4) for a in args[1:]]
            assert len(words) == (int(match[2][2:]) if match[2] else 1)
            self.store(self.add(args[0], int(match[4] or 0)), np.concatenate(words, axis=1))
            return None
        for start, word in self._words().items():
            if text.startswith(start):
                return word(text, args)
        raise NotImplementedError(text)

    def _words(self):
        return {
            "fma.rn.f32 $0, $1, $2, $3;": lambda _, a: [
                (a[0].astype(np.float64) * a[1] + a[2]).astype(F32)
            ],
            "ex2.approx": lambda _, a: [np.exp2(a[0])],
            "rcp.approx": lambda _, a: [(1 / a[0]).astype(F32)],
            "movmatrix.sync.aligned.m8n8.trans.b16": self._turn,
            "rsqrt.approx": lambda _, a: [(1 / np.sqrt(a[0])).astype(F32)],
            "prmt.b32 $0, $1, $2,": self._permute,
            "sub.rn.bf16x2 $0, $1, $2;": lambda _, a: [
                to_bf16(from_bf16(a[0]) - from_bf16(a[1]))
                | to_bf16(from_bf16(a[0] >> 16) - from_bf16(a[1] >> 16)) << 16
            ],
            "cvt.rn.bf16x2.f32 $0, $2, $1;": lambda _, a: [to_bf16(a[0]) | to_bf16(a[1]) << 16],
            "cvt.rni.s32.f32": lambda _, a: [np.rint(a[0]).astype(np.int32).view(U32)],
            "max.u16x2": lambda _, a: [
                np.maximum(
                    *(x.view(np.uint16).reshape(-1, 2) for x in map(np.ascontiguousarray, a))
                )
                .reshape(-1)
                .view(U32)
            ],
            "{.reg .f32 a; abs.f32 a, $1; max.f32 $0, a, $2;}": lambda _, a: [
                np.maximum(np.abs(a[0]), a[1])
            ],
            "{.reg .b16 h, z; mov.b16 z, 0; cvt.rn.bf16.f32 h, $1; mov.b32 $0, {z, h};}": (
                lambda _, a: [from_bf16(to_bf16(a[0]))]
            ),
            "{.reg .b16 h, z; mov.b16 z, 0; ld.global.nc.b16 h, [$1];": lambda _, a: [
                from_bf16(np.ascontiguousarray(self.load(a[0], 2)).view(np.uint16)[:, 0])
            ],
            "{.reg .b16 h; cvt.rn.bf16.f32 h, $1; st.global.b16 [$0], h;}": lambda _, a: self.store(
                a[0], to_bf16(a[1]).astype(np.uint16).view(np.uint8).reshape(-1, 2)
            ),
            "{.reg .b32 a, b; cvt.rn.bf16x2.f32 a, $2, $1;": lambda _, a: self.store(
                a[0],
                np.stack([to_bf16(x) for x in a[1:]], 1).astype(np.uint16).view(np.uint8),
            ),
            "{.reg .b16 lo, hi; mov.b32 {lo, hi}, $2; cvt.f32.f16": lambda _, a: [
                np.ascontiguousarray(a[0]).view(np.float16).reshape(-1, 2)[:, i].astype(F32)
                for i in range(2)
            ],
            "{.reg .b32 a; mapa.shared::cluster": self._remote,
            "{.reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1;": lambda _, a: [
                np.ascontiguousarray(
                    np.stack([np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn) for x in a], 1)
                ).view(U32)[:, 0]
            ],
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": self._mma,
            "barrier.cluster": lambda _, a: None,
            "griddepcontrol": lambda _, a: None,
        }

    def _permute(self, text, args):
        selector = int(text.rsplit(",", 1)[1].strip(" ;"))
        source = np.concatenate([a.view(np.uint8).reshape(-1, 4) for a in args], axis=1)
        picked = [source[:, selector >> (4 * i) & 7] for i in range(4)]
        return [np.ascontiguousarray(np.stack(picked, axis=1)).view(U32)[:, 0]]

    def _remote(self, text, args):
        at, rank = args
        block = self.index // self.threads // self.cluster * self.cluster + rank.astype(np.int64)
        return [np.ascontiguousarray(self.load(at, 4, block)).view(F32)[:, 0]]

    def _turn(self, text, args):
        pieces = np.ascontiguousarray(args[0]).view(np.uint16).reshape(-1, 8, 8)
        turned = np.ascontiguousarray(pieces.transpose(0, 2, 1))
        return [turned.reshape(-1).view(U32)]

    def _mma(self, text, args):
        a, b, c = (
            np.stack(part).reshape(len(part), -1, 32) for part in (args[:4], args[4:6], args[6:])
        )
        W = a.shape[1]
        lane = np.arange(32)
        g, t = lane // 4, lane % 4
        A, B, C = (np.zeros((W, *shape), F32) for shape in ((16, 16), (16, 8), (16, 8)))
        for e in range(2):
            for r in range(4):
                A[:, g + 8 * (r % 2), 2 * t + e + 8 * (r // 2)] = from_bf16(a[r] >> (16 * e))
            for r in range(2):
                B[:, 2 * t + e + 8 * r, g] = from_bf16(b[r] >> (16 * e))
                C[:, g + 8 * r, 2 * t + e] = c[2 * r + e]
        C = C + A @ B
        return [
            np.ascontiguousarray(C[:, g + 8 * (i // 2), 2 * t + i % 2]).reshape(-1)
            for i in range(4)
        ]


@contextlib.contextmanager
def interpreted(launch: Launch, monkeypatch, *modules):
    """Inside, bodies of `modules` run on `launch` when they are called."""
    with monkeypatch.context() as patch:
        for name in ("const", "real", "add", "mul", "less", "address", "thread", "block",
                     "when", "loop", "swap", "asm"):  # fmt: skip
            patch.setattr(ptx, name, getattr(launch, name))
        patch.setattr(ptx, "wide", lambda a: a.astype(U64))
        patch.setattr(ptx, "barrier", lambda: None)
        for name, kind in (("i32", U32), ("i64", U64), ("f32", F32)):
            patch.setattr(ptx, name, lambda kind=kind: kind)
        for module in (ptx, *modules):
            patch.setattr(module, "arith", Arith)
        yield
