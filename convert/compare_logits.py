"""How far two forms of one model differ on a text: logits of both, one weight in memory at a time.

A checkpoint with an adapter in use is compared with the exported folder in which it is merged. Both
run through the decoder layer by layer, each weight read when it is used and dropped after, so that
72B needs about 3 GB. What is compared is not judged here.
"""

import collections.abc
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.export_rows import Source
from qwen_jax import model as decoder
from qwen_jax.adapters import Lora
from qwen_jax.config import ModelConfig
from qwen_jax.kernels.attention import attention
from qwen_jax.kernels.rms_norm import rms_norm
from qwen_jax.params import ParamSpec, param_table
from qwen_jax.positions import Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """Of the next-token distributions at every position of a text."""

    tokens: int
    mean_kl: float  # nats, of the second against the first
    max_kl: float
    same_top: float  # share of positions with the same most likely token

    def __str__(self) -> str:
        return (
            f"KL mean {self.mean_kl:.3g}, largest {self.max_kl:.3g} nats over {self.tokens} "
            f"tokens; the same most likely token at {100 * self.same_top:.1f} % of them"
        )


def streamed_logits(
    cfg: ModelConfig,
    source: Source,
    lora: Lora | None,
    ids: np.ndarray,  # int32 [T]
) -> np.ndarray:  # float32 [T, V]
    """All logits of one text at inference, computed in the dtype of the embedding."""
    specs = {spec.path: spec for spec in param_table(cfg)}
    dtype = source.dtype(specs[("wte",)], 0)
    T = len(ids)
    place = Place.of(cfg, jnp.zeros((1,), jnp.int32), T, jnp.array([T], jnp.int32))

    def attend(q, k, v, kept):
        return attention(q, k, v, q_index=place.positions, causal_square=True), kept

    x = jnp.asarray(_rows_of(source, specs[("wte",)], ids).astype(dtype))[None]  # [1, T, D]
    pairs = decoder.lora_layers(lora, dtype)
    for layer in range(cfg.num_layers):
        weights = _Layer(lambda spec, layer=layer: _whole(source, spec, layer, dtype), specs)
        low = jax.tree.map(lambda stack, layer=layer: stack[layer], pairs)
        x, _ = decoder.decoder_layer(cfg, x, weights, low, place.angles, place.logn, attend)
    x = rms_norm(x, jnp.asarray(_whole(source, specs[("ln_f",)], 0, dtype)), cfg.norm_eps)
    logits = np.empty((T, cfg.vocab_size), np.float32)
    row = 0
    for block in source.blocks(specs[("lm_head",)], 0):
        head = {"lm_head": jnp.asarray(block.astype(dtype))}
        logits[:, row : row + len(block)] = decoder.unembed(head, x)[0]
        row += len(block)
    return logits


def difference(
    first: np.ndarray,  # float32 [T, V]
    second: np.ndarray,  # float32 [T, V]
) -> Difference:
    """KL(first || second) in float64, position by position."""
    kl = np.array([_kl(a, b) for a, b in zip(first, second, strict=True)])
    same = first.argmax(-1) == second.argmax(-1)
    return Difference(
        tokens=len(kl),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        same_top=float(same.mean()),
    )


def _kl(a: np.ndarray, b: np.ndarray) -> float:
    log_p, log_q = (x - x.max() for x in (a.astype(np.float64), b.astype(np.float64)))
    log_p, log_q = (x - np.log(np.exp(x).sum()) for x in (log_p, log_q))
    return max(float((np.exp(log_p) * (log_p - log_q)).sum()), 0.0)


class _Layer(collections.abc.Mapping):
    """One layer's weights as the decoder asks for them, each read at that moment."""

    def __init__(self, read: Callable[[ParamSpec], np.ndarray], specs: dict, at=("layers",)):
        self._read, self._specs, self._at = read, specs, at

    def __getitem__(self, name: str) -> Any:
        path = (*self._at, name)
        if path in self._specs:
            spec = self._specs[path]
            return jnp.asarray(self._read(spec)).reshape(spec.shape)
        return _Layer(self._read, self._specs, path)

    def __iter__(self) -> Iterator[str]:
        depth = len(self._at)
        return iter({path[depth] for path in self._specs if path[:depth] == self._at})

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _whole(source: Source, spec: ParamSpec, layer: int, dtype: np.dtype) -> np.ndarray:
    """One torch tensor in the compute dtype, filled block by block."""
    whole, row = np.empty(spec.torch_shape, dtype), 0
    for block in source.blocks(spec, layer):
        whole[row : row + len(block)] = block.astype(dtype)
        row += len(block)
    return whole


def _rows_of(
    source: Source,
    spec: ParamSpec,
    ids: np.ndarray,  # int32 [T]
) -> np.ndarray:  # [T, D]
    rows, start = None, 0
    for block in source.blocks(spec, 0):
        if rows is None:
            rows = np.empty((len(ids), block.shape[1]), block.dtype)
        here = (ids >= start) & (ids < start + len(block))
        rows[here] = block[ids[here] - start]
        start += len(block)
    return rows
