"""A stand-in for kernels/_pallas_ptx: runs a body in numpy, over all threads of a grid at once.

Device memory is one run of bytes, shared memory another for each block; a value is an array
[blocks, threads]. Only whole blocks of straight-line code: no loops, no branches, and what a
barrier orders is in program order anyway.
"""

import re

import ml_dtypes
import numpy as np

_KINDS = {"r": np.uint32, "l": np.uint64, "f": np.float32}


class Machine:
    def __init__(self, blocks: int, threads: int, smem_bytes: int):
        self.shape = (blocks, threads)
        self.memory = np.zeros(256, np.uint8)
        self.shared = np.full((blocks, smem_bytes), 0xAA, np.uint8)

    def place(self, array: np.ndarray) -> int:
        """Copies an array into device memory; its address."""
        at = self.memory.size
        data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        self.memory = np.concatenate([self.memory, data, np.zeros(-data.size % 256, np.uint8)])
        return at

    # The words that a body may use.
    def i32(self):
        return "r"

    def i64(self):
        return "l"

    def f32(self):
        return "f"

    def _full(self, value, dtype):
        return np.full(self.shape, value, dtype)

    def const(self, value: int):
        return self._full(value, np.uint32)

    def add(self, a, b):
        return a + (a.dtype.type(b) if isinstance(b, int) else b)

    def mul(self, a, b):
        return a * (a.dtype.type(b) if isinstance(b, int) else b)

    def wide(self, a):
        return a.astype(np.uint64)

    def address(self, ref):
        return self.const(0) if ref == "shared" else self._full(ref, np.uint64)

    def thread(self):
        index = np.broadcast_to(np.arange(self.shape[1], dtype=np.uint32), self.shape)
        return index, index % 32, index // 32

    def block(self):
        return np.broadcast_to(np.arange(self.shape[0], dtype=np.uint32)[:, None], self.shape)

    def barrier(self):
        pass

    def load_shared(self, at, offset: int):
        index = (at + np.uint32(offset))[..., None] + np.arange(16)
        assert (at % 16 == 0).all()
        data = self.shared[np.arange(self.shape[0])[:, None, None], index]
        return list(np.moveaxis(data.view(np.uint32), -1, 0))

    def asm(self, text: str, args, results=(), *, pure=False):
        del pure
        offset = int((re.search(r"\+(\d+)\]", text) or [0, 0])[1])
        name = re.sub(r"^\{\.reg [^;]*;\s*", "", text).split()[0]
        parts = name.split(".")
        if parts[0] == "ld":
            return self._load(parts, args[0] + np.uint64(offset), results, "cvt.f32.f16" in text)
        if parts[0] == "st":
            return self._store(parts, args[0] + args[0].dtype.type(offset), args[1:])
        if parts[0] == "shfl":
            lanes = args[0].reshape(self.shape[0], -1, 32)
            index = (args[1] % 32).astype(np.int64).reshape(lanes.shape)
            return np.take_along_axis(lanes, index, -1).reshape(self.shape)
        if parts[0] == "cvt":
            dtype = ml_dtypes.bfloat16 if "bf16x2" in name else ml_dtypes.float8_e4m3fn
            limit = np.float32(448 if "satfinite" in name else np.inf)
            values = np.clip(np.stack(args, -1), -limit, limit).astype(dtype)
            return values.view(np.uint32)[..., 0]
        a = args[0]
        b = args[1] if len(args) > 1 else np.uint32(int(re.search(r"(\d+);$", text)[1]))
        operations = {
            "shr": np.right_shift, "and": np.bitwise_and, "xor": np.bitwise_xor,
            "mul": np.multiply, "add": np.add, "div": np.floor_divide, "rem": np.remainder,
        }  # fmt: skip
        return operations[parts[0]](a, b)

    def _load(self, parts, at, results, is_half: bool):
        count = int(parts[-2][1:]) if parts[-2] in ("v2", "v4") else 1
        size = int(parts[-1][1:]) // 8
        assert (at % np.uint64(size * count) == 0).all(), "a load that is not aligned"
        assert (at >= 256).all() and (at + size * count <= self.memory.size).all()
        data = self.memory[at[..., None] + np.arange(size * count, dtype=np.uint64)]
        if is_half:
            return data.view(np.float16)[..., 0].astype(np.float32)
        if size == 1:
            return data[..., 0].astype(np.uint32)
        words = data.view(_KINDS[results[0]])
        return words[..., 0] if count == 1 else list(np.moveaxis(words, -1, 0))

    def _store(self, parts, at, words):
        data = np.stack(words, -1).view(np.uint8)  # [blocks, threads, 16]
        assert (at % 16 == 0).all(), "a store that is not aligned"
        index = at[..., None] + np.arange(16, dtype=at.dtype)
        if parts[1] == "shared":
            self.shared[np.arange(self.shape[0])[:, None, None], index] = data
        else:
            assert np.unique(at).size == at.size, "two threads store to one place"
            self.memory[index] = data
