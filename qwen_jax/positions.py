"""Where tokens stand, and what follows from it: rotation with dynamic NTK, and logn.

All of it is the same for every layer and is computed once a step, in float32.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import ModelConfig

# Dynamic NTK has one frequency row for each doubling of the context; 16 doublings are plenty.
_NTK_ROWS = 16


def rope_table(cfg: ModelConfig) -> np.ndarray:
    """Inverse frequencies float32 [rows, H/2]: row 0 plain, row j for NTK alpha 2^(j+1) - 1.

    The base is scaled by alpha^(H / (H - 2)). numpy on the host gives torch's float32 rounding;
    the frequencies are multiplied by positions up to 32,768, so an ulp here matters there.
    """
    rows = []
    for j in range(_NTK_ROWS if cfg.use_dynamic_ntk else 1):
        alpha = 2 ** (j + 1) - 1
        base = cfg.rope_base * alpha ** (cfg.head_dim / (cfg.head_dim - 2)) if j else cfg.rope_base
        exponents = np.arange(0, cfg.head_dim, 2, dtype=np.float32) / np.float32(cfg.head_dim)
        rows.append(np.float32(1.0) / np.power(np.float32(base), exponents, dtype=np.float32))
    return np.stack(rows)


def ntk_row(cfg: ModelConfig, prompt_lengths: jax.Array) -> jax.Array:
    """int32 [B] -> row of `rope_table` for each prompt; 0 up to seq_length or without dynamic NTK.

    The original's 2^ceil(log2(n / seq_length) + 1) - 1, in whole numbers: row j holds for
    seq_length 2^(j-1) < n <= seq_length 2^j.
    """
    if not cfg.use_dynamic_ntk:
        return jnp.zeros_like(prompt_lengths)
    limits = [min(cfg.seq_length << j, 2**31 - 1) for j in range(_NTK_ROWS - 1)]
    return jnp.sum(prompt_lengths[:, None] > jnp.array(limits, jnp.int32), axis=1, dtype=jnp.int32)


def rope_angles(
    cfg: ModelConfig,
    positions: jax.Array,  # int32 [B, T]
    ntk: jax.Array,  # int32 [B]
) -> tuple[jax.Array, jax.Array]:  # cos, sin float32 [B, T, 1, H/2]
    """Rotation angles, the same for all layers: computed once a step."""
    frequencies = jnp.asarray(rope_table(cfg))[ntk]  # [B, H/2]
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[:, None, :]
    return jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]


def rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B, T, N, H]: the first half of each head against the second, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def positions_within(segments: jax.Array) -> jax.Array:
    """int32 [B, T], neighbours that are equal belong together -> [B, T]: from 0 in each segment."""
    slots = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return slots - jax.lax.cummax(jnp.where(begins, slots, 0), axis=1)


def logn_scale(cfg: ModelConfig, positions: jax.Array) -> jax.Array:
    """Query factor float32 [B, T, 1, 1]: log(p + 1) / log(seq_length) past seq_length, else 1."""
    factor = jnp.log(positions.astype(jnp.float32) + 1) / np.log(cfg.seq_length)
    return jnp.where(positions >= cfg.seq_length, factor, 1.0)[:, :, None, None]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where new tokens stand: what follows from the rows' lengths alone, for all layers."""

    positions: jax.Array  # int32 [B, T]
    ntk: jax.Array  # int32 [B]
    angles: tuple[jax.Array, jax.Array]
    logn: jax.Array | None  # float32 [B, T, 1, 1]

    @classmethod
    def of(
        cls,
        cfg: ModelConfig,
        filled: jax.Array,  # int32 [B]: tokens before these
        T: int,
        prompt_lengths: jax.Array,  # int32 [B]
        ntk_before: jax.Array | None = None,  # int32 [B]: kept by rows that hold tokens already
    ) -> "Place":
        ntk = ntk_row(cfg, prompt_lengths)
        if ntk_before is not None:
            ntk = jnp.where(filled == 0, ntk, ntk_before)
        positions = filled[:, None] + jnp.arange(T, dtype=jnp.int32)
        logn = logn_scale(cfg, positions) if cfg.use_logn_attn else None
        return cls(positions, ntk, rope_angles(cfg, positions, ntk), logn)
