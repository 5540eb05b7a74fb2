"""Mosaic GPU body of the product in front of which training dequantizes a weight, with LoRA in it.

    y [M, N] = (x [M, K] @ w^T + low [M, R] @ b [R, N]) * scale [M]

A thread block has one warpgroup that loads tiles and two that multiply half of its rows each. The
two blocks of a cluster are neighbours, and share the tiles that both need. Blocks stay and make one
piece of y after the other; the next one is loaded while the last one is stored. The low-rank term
is one more multiplication at the end of a piece, which costs nothing: by itself it would write y,
and the large product would read it again. x and w are bfloat16, or both e4m3, and then the scale is
what a row of codes was divided by.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen_jax.kernels._pallas_versions import load
from qwen_jax.kernels.hopper import multiprocessors

_CONSUMERS = 2  # warpgroups that multiply; the one after them loads
_LINE = 128  # bytes of a row of a tile along k: what the widest swizzle takes
_RANKS = (16, 32, 64)  # that tiles of the low-rank term are padded to
_LOADER_REGISTERS, _CONSUMER_REGISTERS = 40, 232


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the work is cut."""

    rows: int = 64  # of each multiplying warpgroup
    columns: int = 256
    stages: int = 4  # tiles along k on their way
    cluster: int = 2  # neighbouring thread blocks
    share_x: bool = False  # neighbours along the columns, which share x; else along the rows: w
    wide: int = 8  # pieces side by side along the rows, before the next columns
    lag: int = 0  # multiplications that may still run when the next one starts
    store: int = 32  # columns that are stored at a time
    stores: int = 2  # of them on their way, of each warpgroup

    @property
    def step(self) -> tuple[int, int]:
        """Rows and columns that a cluster makes at a time."""
        rows, columns = _CONSUMERS * self.rows, self.columns
        if self.share_x:
            return rows, columns * self.cluster
        return rows * self.cluster, columns


def gemm(
    x: jax.Array,  # bfloat16 or float8_e4m3fn [M, K]
    w: jax.Array,  # the same, [N, K]; bfloat16 [K, N] if `turned`
    low: jax.Array | None = None,  # bfloat16 [M, R]
    b: jax.Array | None = None,  # bfloat16 [R, N]
    scale: jax.Array | None = None,  # float32 [M]
    *,
    turned: bool = False,
    into: tuple[jax.Array, jax.Array] | None = None,  # bfloat16 [L, M, N], int32 []: a layer of it
    tiling: Tiling | None = None,
    blocks: int | None = None,  # at most; None: as many as the card has multiprocessors
    interpret=None,
) -> jax.Array:  # bfloat16 [M, N]; or the stack, with y in the place of that layer
    """Sums in float32, rounded once. NotImplementedError for sizes that tiles do not divide."""
    M, K = x.shape
    N = w.shape[1] if turned else w.shape[0]
    R = 0 if low is None else low.shape[1]
    t = check(M, N, K, R, tiling)
    body = Body(
        M=M, N=N, K=K, R=_padded_rank(R), turned=turned, scaled=scale is not None, tiling=t,
        dtype=x.dtype,
    )  # fmt: skip
    operands = [a for a in (x, w, low, b, scale) if a is not None]
    clusters = body.clusters((blocks or multiprocessors()) // t.cluster)
    grid = {"grid": (clusters,), "grid_names": ("cluster_grid",)}
    if t.cluster > 1:
        grid |= {"cluster": (t.cluster,), "cluster_names": ("cluster",)}
    options = {
        "mesh": plgpu.Mesh(**grid, num_threads=_CONSUMERS + 1, thread_name="warpgroup"),
        "compiler_params": plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        "name": "gemm",
        **({} if interpret is None else {"interpret": interpret}),
    }
    if into is None:
        return pl.kernel(body.run, out_type=jax.ShapeDtypeStruct((M, N), jnp.bfloat16), **options)(
            *operands
        )
    stack, layer = into
    stack = jax.new_ref(stack, memory_space=plgpu.GMEM)  # a kernel writes to it in place
    pl.kernel(body.run_into, **options)(*operands, layer.reshape(1), stack)
    return jax.freeze(stack)


def check(M: int, N: int, K: int, R: int, tiling: Tiling | None = None) -> Tiling:
    """The tiling that serves, or NotImplementedError with the reason that none does."""
    t = tiling or Tiling()
    if R > 16:  # room for the tiles of the low-rank term
        t = dataclasses.replace(t, stages=min(t.stages, 3))
    rows, columns = t.step
    if M % rows or N % columns or K % _LINE:
        raise NotImplementedError(
            f"a product of {M} x {K} with {N} x {K} is not cut by tiles of "
            f"{rows} x {columns} x {_LINE}"
        )
    if R % 8 or max(_RANKS) < R:
        raise NotImplementedError(f"a low-rank term of rank {R}; expected 8, 16 .. {max(_RANKS)}")
    return t


def _padded_rank(R: int) -> int:
    """As wgmma and a swizzle take it; the copy engine fills what is missing with zeros."""
    return next(rank for rank in (0, *_RANKS) if rank >= R)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Body:
    """The code of a thread block."""

    M: int
    N: int
    K: int
    R: int  # padded
    turned: bool
    scaled: bool
    tiling: Tiling
    dtype: jnp.dtype  # of x and w

    @property
    def pieces(self) -> int:
        """That clusters make."""
        rows, columns = self.tiling.step
        return self.M // rows * (self.N // columns)

    def clusters(self, most: int) -> int:
        """As few as make all pieces in as many turns as `most` would need: the multiprocessors that
        are left over can dequantize the next weight meanwhile.
        """
        turns = -(-self.pieces // most)
        return -(-self.pieces // turns)

    @property
    def _steps(self) -> int:
        """Along k, of a piece."""
        return self.K // self._k

    @property
    def _k(self) -> int:
        """Values of a line of a tile."""
        return _LINE // jnp.dtype(self.dtype).itemsize

    def scratch(self) -> dict:
        """Shared memory and barriers, by the names under which the methods below take them."""
        t, k, rows = self.tiling, self._k, _CONSUMERS * self.tiling.rows

        def tile(*shape: int, slots=(), line: int = 0, dtype=jnp.bfloat16):
            # How wgmma and the copy engine want it: in blocks of eight lines, swizzled.
            size = jnp.dtype(dtype).itemsize
            swizzle = plgpu.find_swizzle((line or shape[-1]) * size * 8)
            order = (
                plgpu.TilingTransform((8, swizzle // size)),
                plgpu.SwizzleTransform(swizzle),
            )
            return plgpu.SMEM((*slots, *shape), dtype, transforms=order)

        used = {"num_arrivals": _CONSUMERS}
        if t.cluster > 1:  # by both blocks: a tile may have come for both
            empty = plgpu.ClusterBarrier(
                collective_axes=("cluster",), num_barriers=t.stages, **used
            )
        else:
            empty = plgpu.Barrier(num_barriers=t.stages, **used)
        pair = {}
        if self.R:
            pair = {
                "low_tile": tile(rows, self.R),
                # Both operands of a multiplication lie in lines of one length.
                "b_tile": tile(self.R, t.columns, line=self.R),
                "pair_full": plgpu.Barrier(num_arrivals=2),
                "pair_empty": plgpu.Barrier(**used),
            }
        w_tile = (k, t.columns) if self.turned else (t.columns, k)
        return {
            "x_tile": tile(rows, k, slots=(t.stages,), dtype=self.dtype),
            "w_tile": tile(*w_tile, slots=(t.stages,), dtype=self.dtype),
            "y_tile": tile(64, t.store, slots=(_CONSUMERS, t.stores)),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=t.stages),
            "empty": empty,
            **pair,
        }

    def run(self, *refs) -> None:
        """Operands and y."""
        # Not as scratch_types of the kernel, which know no tiled memory.
        pl.run_scoped(
            lambda **scratch: self(*refs, **scratch), collective_axes="warpgroup", **self.scratch()
        )

    def run_into(self, *refs) -> None:
        """Operands, the number of a layer, and a stack of which y is that layer."""
        *operands, layer, stack = refs
        self.run(*operands, stack.at[layer[0]])

    def __call__(self, x, w, *refs, **scratch) -> None:
        *refs, y = refs
        *pair, scale = refs if self.scaled else (*refs, None)
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == _CONSUMERS)
        def _():
            plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")
            self._load_all(x, w, *pair, **scratch)

        @pl.when(warpgroup < _CONSUMERS)
        def _():
            plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
            self._multiply_all(warpgroup, scale, y, **scratch)

    def _each_piece(self, make) -> None:
        """make(number of the piece among those of this block, first row, first column)."""
        t = self.tiling
        rows, columns = t.step

        @plgpu.nd_loop((self.pieces,), collective_axes="cluster_grid")
        def _(info: plgpu.NDLoopInfo):
            (index,) = info.index
            m, n = plgpu.planar_snake(index, (self.M // rows, self.N // columns), 0, t.wide)
            rank = lax.axis_index("cluster") if t.cluster > 1 else 0
            row, column = m * rows, n * columns
            if t.share_x:
                column += rank * t.columns
            else:
                row += rank * _CONSUMERS * t.rows
            make(info.local_index, row, column)

    def _load_all(
        self, x, w, low=None, b=None, *, x_tile, w_tile, full, empty,
        low_tile=None, b_tile=None, pair_full=None, pair_empty=None, **_,
    ) -> None:  # fmt: skip
        t, k = self.tiling, self._k
        both = {"collective_axes": "cluster"} if t.cluster > 1 else {}
        x_for, w_for = (both, {}) if t.share_x else ({}, both)

        def load(number, row, column):
            rows, columns = pl.ds(row, _CONSUMERS * t.rows), pl.ds(column, t.columns)

            def step(i, _):
                count = number * self._steps + i
                slot = lax.rem(count, t.stages)

                @pl.when(count >= t.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                along = pl.ds(i * k, k)
                of_w = (along, columns) if self.turned else (columns, along)
                plgpu.copy_gmem_to_smem(x.at[rows, along], x_tile.at[slot], full.at[slot], **x_for)
                plgpu.copy_gmem_to_smem(w.at[of_w], w_tile.at[slot], full.at[slot], **w_for)

            lax.fori_loop(0, self._steps, step, None)
            if self.R:
                # Last, though it could be first: by now the pair before has long been used.
                @pl.when(number > 0)
                def _():
                    plgpu.barrier_wait(pair_empty)

                # A start that is known only here: the padded rank may reach past the real one.
                ranks = pl.ds(number * 0, self.R)
                plgpu.copy_gmem_to_smem(low.at[rows, ranks], low_tile, pair_full)
                plgpu.copy_gmem_to_smem(b.at[ranks, columns], b_tile, pair_full)

        self._each_piece(load)
        # A block must not end while its neighbour may still tell it that a tile was used.
        blocks = lax.axis_size("cluster_grid")
        mine = (self.pieces - lax.axis_index("cluster_grid") + blocks - 1) // blocks

        def wait(i, _):
            plgpu.barrier_wait(empty.at[lax.rem(mine * self._steps + i, t.stages)])

        lax.fori_loop(0, t.stages, wait, None)
        if self.R:
            plgpu.barrier_wait(pair_empty)

    def _multiply_all(
        self, warpgroup, scale, y, *, x_tile, w_tile, y_tile, full, empty,
        low_tile=None, b_tile=None, pair_full=None, pair_empty=None,
    ) -> None:  # fmt: skip
        t = self.tiling
        own = pl.ds(warpgroup * t.rows, t.rows)

        def release(count):
            plgpu.barrier_arrive(empty.at[lax.rem(count, t.stages)])

        def piece(sums, number, row, column):
            first = row + warpgroup * t.rows
            if self.scaled:  # on its way early: it is needed last
                factor = load(
                    scale, (pl.ds(first, t.rows),), layout=plgpu.Layout.WGMMA.reduce(1),
                    optimized=False,
                )  # fmt: skip

            def step(i, _):
                count = number * self._steps + i
                slot = lax.rem(count, t.stages)
                plgpu.barrier_wait(full.at[slot])
                w_now = w_tile.at[slot]
                if not self.turned:
                    w_now = w_now.transpose((1, 0))
                plgpu.wgmma(sums, x_tile.at[slot, own], w_now)
                plgpu.wgmma_wait(t.lag)
                pl.when(i >= t.lag)(lambda: release(count - t.lag))

            lax.fori_loop(0, self._steps, step, None)
            if t.lag:
                plgpu.wgmma_wait(0)
                for back in range(t.lag, 0, -1):
                    release((number + 1) * self._steps - back)
            if self.R:
                plgpu.barrier_wait(pair_full)
                plgpu.wgmma(sums, low_tile.at[own], b_tile)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(pair_empty)
            values = sums[...]
            if self.scaled:
                values *= lax.broadcast_in_dim(factor, values.shape, (0,))
            self._store(values.astype(y.dtype), y, first, column, y_tile.at[warpgroup])

        def make(*at):
            accumulator = plgpu.ACC((t.rows, t.columns), jnp.float32)
            pl.run_scoped(lambda sums: piece(sums, *at), accumulator)

        self._each_piece(make)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _store(self, values, y, row, column, y_tile) -> None:
        """Through shared memory, a few columns at a time."""
        t, slot = self.tiling, 0
        for r in range(0, t.rows, 64):
            for c in range(0, t.columns, t.store):
                plgpu.wait_smem_to_gmem(t.stores - 1, wait_read_only=True)
                y_tile[slot] = values[r : r + 64, c : c + t.store]
                plgpu.commit_smem()
                target = y.at[pl.ds(row + r, 64), pl.ds(column + c, t.store)]
                plgpu.copy_smem_to_gmem(y_tile.at[slot], target)
                slot = (slot + 1) % t.stores
