"""Mosaic GPU body of the product in front of which training dequantizes a weight, with LoRA in it.

    y [M, N] = x [M, K] @ w^T + low [M, R] @ b [R, N]

A thread block makes 256 x 128 values at a time: one warpgroup loads, two multiply 128 rows each.
The two blocks of a cluster have neighbouring columns and share what they load of x. Blocks stay and
take one tile after the other, and the next one is loaded while the last one is stored. The low-rank
term is one more multiplication at the end of a tile, which costs nothing: by itself it would write
y, and the large product would read it again.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_CONSUMERS = 2  # warpgroups that multiply; the one after them loads
_LINE = 128  # bytes of a row of a tile along k: what the widest swizzle takes
_RANKS = (16, 32, 64)
_LOADER_REGISTERS, _CONSUMER_REGISTERS = 40, 232


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the work is cut."""

    rows: int = 128  # of each multiplying warpgroup
    columns: int = 128
    stages: int = 4  # tiles along k on their way
    cluster: int = 2  # neighbouring thread blocks that share what they load of x
    wide: int = 8  # row tiles that are worked on side by side
    lag: int = 0  # multiplications that may still run when the next one starts
    store: int = 32  # columns that are stored at a time
    stores: int = 2  # of them on their way, of each warpgroup


def gemm(
    x: jax.Array,  # bfloat16 [M, K]
    w: jax.Array,  # bfloat16 [N, K], or [K, N] if `turned`
    low: jax.Array | None = None,  # bfloat16 [M, R]
    b: jax.Array | None = None,  # bfloat16 [R, N]
    *,
    turned: bool = False,
    tiling: Tiling | None = None,
    blocks: int = 132,  # as many as the card has multiprocessors
    interpret=None,
) -> jax.Array:  # bfloat16 [M, N]
    """Sums in float32, rounded once. NotImplementedError for sizes that tiles do not divide."""
    M, K = x.shape
    N = w.shape[1] if turned else w.shape[0]
    R = 0 if low is None else low.shape[1]
    t = check(M, N, K, R, tiling)
    body = Body(M=M, N=N, K=K, R=_padded_rank(R), turned=turned, tiling=t)
    inputs = [x, w] if low is None else [x, w, low, b]
    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((M, N), x.dtype),
        grid=(min(blocks // t.cluster, body.tiles),),
        grid_names=("cluster_grid",),
        cluster=(t.cluster,),
        cluster_names=("cluster",),
        num_threads=_CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=body.scratch(x.dtype),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **({} if interpret is None else {"interpret": interpret}),
    )
    return run(*inputs)


def check(M: int, N: int, K: int, R: int, tiling: Tiling | None = None) -> Tiling:
    """The tiling that serves, or NotImplementedError with the reason that none does."""
    if tiling is None:
        tiling = Tiling() if M % 256 == 0 else Tiling(rows=64)
        if R > 16:  # room for the tiles of the low-rank term
            tiling = dataclasses.replace(tiling, stages=3)
    t = tiling
    if M % (_CONSUMERS * t.rows) or N % (t.cluster * t.columns) or K % (_LINE // 2):
        raise NotImplementedError(
            f"a product of {M} x {K} with {N} x {K} is not cut by tiles of "
            f"{_CONSUMERS * t.rows} x {t.cluster * t.columns} x {_LINE // 2}"
        )
    most = _RANKS[-1]
    if R % 8 or R > most:
        raise NotImplementedError(f"a low-rank term of rank {R}; expected 8, 16 .. {most}")
    return t


def _padded_rank(R: int) -> int:
    """As wgmma and a swizzle take it; the copy engine fills what is missing with zeros."""
    return next(rank for rank in (0, *_RANKS) if rank >= R)


def _swizzled(columns: int, dtype) -> tuple:
    """How a tile of rows of so many values lies in shared memory for wgmma and the copy engine."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * size * 8)
    return (
        plgpu.TilingTransform((8, swizzle // size)),
        plgpu.SwizzleTransform(swizzle),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Body:
    """The code of a thread block."""

    M: int
    N: int
    K: int
    R: int  # padded
    turned: bool
    tiling: Tiling

    @property
    def tiles(self) -> int:
        """Of a cluster."""
        t = self.tiling
        return self.M // (_CONSUMERS * t.rows) * (self.N // (t.cluster * t.columns))

    def scratch(self, dtype) -> dict:
        t = self.tiling
        k = _LINE // jnp.dtype(dtype).itemsize
        rows = _CONSUMERS * t.rows
        w_tile = (k, t.columns) if self.turned else (t.columns, k)

        def shared(*shape: int, slots=(), line: int = 0):
            transforms = _swizzled(line or shape[-1], dtype)
            return plgpu.SMEM((*slots, *shape), dtype, transforms=transforms)

        own = {}
        if self.R:
            own = {
                "low_tile": shared(t.rows, self.R, slots=(_CONSUMERS,)),
                # Both operands of a multiplication lie in lines of one length.
                "b_tile": shared(self.R, t.columns, slots=(_CONSUMERS,), line=self.R),
                "low_full": plgpu.Barrier(num_arrivals=2, num_barriers=_CONSUMERS),
            }
        empty = plgpu.Barrier
        if t.cluster > 1:
            empty = functools.partial(plgpu.ClusterBarrier, collective_axes=("cluster",))
        return {
            "x_tile": shared(rows, k, slots=(t.stages,)),
            "w_tile": shared(*w_tile, slots=(t.stages,)),
            "y_tile": shared(64, t.store, slots=(_CONSUMERS, t.stores)),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=t.stages),
            "empty": empty(num_arrivals=_CONSUMERS, num_barriers=t.stages),
            **own,
        }

    def __call__(self, x, w, *refs, full, empty, **scratch) -> None:
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == _CONSUMERS)
        def _load():
            plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")
            self._load(x, w, full, empty, **scratch)

        @pl.when(warpgroup < _CONSUMERS)
        def _multiply():
            plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
            self._multiply(warpgroup, *refs, full=full, empty=empty, **scratch)

    @property
    def _steps(self) -> int:
        """Along k, of a tile."""
        return self.K // (_LINE // 2)

    def _each_tile(self, body) -> None:
        """body(number of the tile among those of this block, first row, first column)."""
        t = self.tiling
        rows, columns = _CONSUMERS * t.rows, t.columns
        shape = (self.M // rows, self.N // (t.cluster * columns))

        @plgpu.nd_loop((self.tiles,), collective_axes="cluster_grid")
        def _(info: plgpu.NDLoopInfo):
            (index,) = info.index
            m, n = plgpu.planar_snake(index, shape, 0, t.wide)
            column = (n * t.cluster + lax.axis_index("cluster")) * columns
            body(info.local_index, m * rows, column)

    def _load(self, x, w, full, empty, *, x_tile, w_tile, **_) -> None:
        t = self.tiling
        k = x_tile.shape[-1]

        def tile(number, row, column):
            def step(i, _):
                count = number * self._steps + i
                slot = lax.rem(count, t.stages)

                @pl.when(count >= t.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                plgpu.copy_gmem_to_smem(
                    x.at[pl.ds(row, _CONSUMERS * t.rows), pl.ds(i * k, k)],
                    x_tile.at[slot],
                    full.at[slot],
                    collective_axes="cluster" if t.cluster > 1 else None,
                )
                of_w = (pl.ds(column, t.columns), pl.ds(i * k, k))
                plgpu.copy_gmem_to_smem(
                    w.at[of_w[::-1] if self.turned else of_w], w_tile.at[slot], full.at[slot]
                )

            lax.fori_loop(0, self._steps, step, None)

        self._each_tile(tile)
        self._drain(empty)

    def _drain(self, empty) -> None:
        """Waits until all that was loaded is used: a block of a cluster must not end before."""
        t = self.tiling
        grid = lax.axis_size("cluster_grid")
        mine = (self.tiles - lax.axis_index("cluster_grid") + grid - 1) // grid
        total = mine * self._steps

        def wait(i, _):
            plgpu.barrier_wait(empty.at[lax.rem(total + i, t.stages)])

        lax.fori_loop(0, t.stages, wait, None)

    def _multiply(
        self, warpgroup, *refs, full, empty, x_tile, w_tile, y_tile,
        low_tile=None, b_tile=None, low_full=None,
    ) -> None:  # fmt: skip
        t = self.tiling
        *pair, y = refs
        own = pl.ds(warpgroup * t.rows, t.rows)

        def tile(number, row, column):
            first = row + warpgroup * t.rows
            columns = pl.ds(column, t.columns)
            if self.R:
                low, b = pair
                ready = low_full.at[warpgroup]
                # A start that is known only here: the padded rank may reach past the real one.
                ranks = pl.ds(number * 0, self.R)
                source = low.at[pl.ds(first, t.rows), ranks]
                plgpu.copy_gmem_to_smem(source, low_tile.at[warpgroup], ready)
                plgpu.copy_gmem_to_smem(b.at[ranks, columns], b_tile.at[warpgroup], ready)

            @functools.partial(pl.run_scoped, sums=plgpu.ACC((t.rows, t.columns), jnp.float32))
            def _(sums):
                def step(i, _):
                    count = number * self._steps + i
                    slot = lax.rem(count, t.stages)
                    plgpu.barrier_wait(full.at[slot])
                    w_slot = w_tile.at[slot]
                    if not self.turned:
                        w_slot = plgpu.transpose_ref(w_slot, (1, 0))
                    plgpu.wgmma(sums, x_tile.at[slot, own], w_slot)
                    plgpu.wgmma_wait(t.lag)

                    @pl.when(i >= t.lag)
                    def _():
                        plgpu.barrier_arrive(empty.at[lax.rem(count - t.lag, t.stages)])

                lax.fori_loop(0, self._steps, step, None)
                if t.lag:
                    plgpu.wgmma_wait(0)
                    for back in range(t.lag, 0, -1):
                        count = (number + 1) * self._steps - back
                        plgpu.barrier_arrive(empty.at[lax.rem(count, t.stages)])
                if self.R:
                    plgpu.barrier_wait(low_full.at[warpgroup])
                    plgpu.wgmma(sums, low_tile.at[warpgroup], b_tile.at[warpgroup])
                    plgpu.wgmma_wait(0)
                values = sums[...].astype(y.dtype)
                self._store(values, y, first, column, y_tile.at[warpgroup])

        self._each_tile(tile)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _store(self, values, y, row, column, y_tile) -> None:
        t = self.tiling
        slots, count = y_tile.shape[0], 0
        for r in range(0, t.rows, 64):
            for c in range(0, t.columns, t.store):
                slot, count = count % slots, count + 1
                plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                y_tile[slot] = values[r : r + 64, c : c + t.store]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(
                    y_tile.at[slot], y.at[pl.ds(row + r, 64), pl.ds(column + c, t.store)]
                )
