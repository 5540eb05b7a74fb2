"""How a layer computes its products, norms and attention in training.

A layer is a function of (mode, x, index, low, frozen, kept) -> (x, kept) and leaves these to the
mode, which is what differs:

    Plain      computes
    Keeping    computes, and writes to kept what remat.py names for its level
    Recalling  takes from kept what is there, and computes the rest

On a mesh each device runs the layer on its own share (layer_loop.py). Where heads and FFN columns
are split over an axis `tensor`, products that end a block give each of its devices a part of a sum,
and what reads a norm gives each a part of its gradient: those are added up here. This file knows
names and kernels, not what a layer is.
"""

import dataclasses
import functools
from typing import Any

import jax
from flax import struct

from qwen_jax.kernels.attention import attention, attention_again, attention_and_statistics
from qwen_jax.kernels.lora_matmul import lora_matmul, products
from qwen_jax.kernels.lora_mlp import Known, down_products, lora_mlp
from qwen_jax.kernels.rms_norm import add_behind, residual_rms_norm
from qwen_jax.quant import Layer, written
from qwen_jax.remat import ATTENTION, DOWN, GATE, LOW, OUT, UP

Kept = dict[str, Any]  # name -> what products or attention gave, or the stacks of it


@struct.dataclass
class Relay:
    """What goes from one product of a layer to the next."""

    baton: jax.Array  # float32 []: kernels/lora_matmul.py
    kept: Any  # of a mode; with a cache, the cache


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def summed(y: jax.Array, axis: str) -> jax.Array:
    """The sum over the devices of an axis. Whoever reads it gives all of them one gradient."""
    return jax.lax.psum(y, axis)


summed.defvjp(lambda y, axis: (jax.lax.psum(y, axis), None), lambda axis, _, gradient: (gradient,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def read_by(y: jax.Array, readers: int, axis: str) -> tuple[jax.Array, ...]:
    """y for each of the readers, whose gradient is a part of y's on each device of an axis."""
    return (y,) * readers


read_by.defvjp(
    lambda y, readers, axis: ((y,) * readers, None),
    lambda readers, axis, _, gradients: (jax.lax.psum(sum(gradients), axis),),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
    """Computes, and keeps nothing."""

    compute: str = "bf16"  # "fp8": products with frozen weights in e4m3
    lean: bool = False  # dequantizes once more for gradients, rather than hold a layer's weights
    kernels: bool = False  # whether they may run: each device is by itself
    tensor: str | None = None  # mesh axis over which heads and FFN columns are split by hand
    place: Layer | None = None  # where kernels find the layer's input

    def norm(self, x, y, weight, eps: float, readers: int = 1, kept: Any = None):
        """x (+ y) [B, T, D], and its norm for each of the readers: kernels/rms_norm.py.

        y is what OUT names: `kept` says where it lies.
        """
        where = {"place": self.place, "y_place": self._out_of(kept)}
        if self.tensor is None:
            return residual_rms_norm(x, y, weight, eps, readers=readers, **where)
        x, (norm,) = residual_rms_norm(x, y, weight, eps, **where)
        return x, read_by(norm, readers, self.tensor)

    def _out_of(self, kept: Any) -> Layer | None:
        return None

    def add(self, x, y) -> jax.Array | Layer:
        """x + y [B, T, D], the input of the next layer, or where it lies."""
        return x + y

    def multiply(self, names, x, weights, pairs, relay: Relay):
        """Products of x [B, T, I] with weights [*O, I], whose results have these names: ys, each
        [B, T, *O], and the relay.
        """
        ys, baton = lora_matmul(x, weights, pairs, relay.baton, self.compute, self.lean)
        return self._whole(names, ys), relay.replace(baton=baton)

    def mlp(self, xs, weights, pairs, relay: Relay):
        """down(up(x) * silu(gate(x))) for the weights up, gate and down: y [B, T, D] and the relay.
        x comes twice, as norm gives it.
        """
        how = self.compute, self.lean, self.kernels
        y, baton = lora_mlp(xs, weights, pairs, relay.baton, *how)
        return self._whole((DOWN,), (y,))[0], relay.replace(baton=baton)

    def attend(self, q, k, v, kept: Kept, **rule):
        """Attention under the rule of kernels/attention.py: y [B, T, N, H] and kept."""
        return attention(q, k, v, **rule), kept

    def _in_parts(self, name: str) -> bool:
        """Whether a device has only a part of the sum that this product is."""
        return self.tensor is not None and name in (OUT, DOWN)

    def _whole(self, names: tuple[str, ...], ys: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(
            summed(y, self.tensor) if self._in_parts(name) else y
            for name, y in zip(names, ys, strict=True)
        )


PLAIN = Plain()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keeping(Plain):
    """Computes, and writes what `names` has to layer `index` of the stacks.

    Without an index, as it is: which says how large the stacks must be.
    """

    names: tuple[str, ...]
    index: jax.Array | None = None  # int32 []

    def multiply(self, names, x, weights, pairs, relay: Relay):
        """As Plain; the kernel of a product writes it to its place."""
        kept = relay.kept
        into = None
        if self.index is not None:
            into = tuple(
                self._place(kept[name]) if name in self.names and not self._in_parts(name) else None
                for name in names
            )
        made = products(x, weights, pairs, relay.baton, self.compute, into)
        ys = []
        for name, y in zip(names, made.ys, strict=True):
            if isinstance(y, Layer):
                kept = {**kept, name: y.stack}
                y = y.cut()
            else:
                (y,) = self._whole((name,), (y,))
                kept = self._write(name, y, kept) if name in self.names else kept
            ys.append(y)
        if LOW in self.names:
            kept = self._write(_low(names), made.lows, kept)
        return tuple(ys), Relay(baton=made.baton, kept=kept)

    def mlp(self, xs, weights, pairs, relay: Relay):
        """As Plain."""
        names = (UP, GATE)
        ys, relay = self.multiply(names, xs[0], weights[:2], pairs[:2], relay)
        kept = relay.kept
        if self.index is not None and self.kernels:  # a kernel reads them where they lie
            ys = [
                self._place(kept[name]) if name in self.names else y
                for name, y in zip(names, ys, strict=True)
            ]
        made = down_products(*ys, weights[2], pairs[2], relay.baton, self.compute, self.kernels)
        if LOW in self.names:
            kept = self._write(_low((DOWN,)), made.lows, kept)
        return self._whole((DOWN,), made.ys)[0], Relay(baton=made.baton, kept=kept)

    def attend(self, q, k, v, kept: Kept, **rule):
        """As Plain."""
        if ATTENTION not in self.names:
            return attention(q, k, v, **rule), kept
        y, statistics = attention_and_statistics(q, k, v, **rule)
        return y, self._write(ATTENTION, (y, statistics), kept)

    def add(self, x, y):
        """As Plain; where kernels may run written to its place, behind the input of this layer."""
        return x + y if self.place is None else add_behind(self.place, x, y)

    def _out_of(self, kept: Kept | None) -> Layer | None:
        here = kept is not None and OUT in self.names and self.index is not None
        return self._place(kept[OUT]) if here else None

    def _place(self, stack: jax.Array) -> Layer:
        return Layer(stack=stack, index=self.index)

    def _write(self, name: str, value: Any, kept: Kept) -> Kept:
        if self.index is not None:
            value = jax.tree.map(lambda s, v: written(self._place(s), v).stack, kept[name], value)
        return {**kept, name: value}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recalling(Plain):
    """Takes from `kept` what is there, and computes the rest."""

    def multiply(self, names, x, weights, pairs, relay: Relay):
        """As Plain."""
        known = None
        if _low(names) in relay.kept:
            ys = tuple(relay.kept[name].cut() for name in names)
            known = (ys, _cut(relay.kept[_low(names)]))
        ys, baton = lora_matmul(x, weights, pairs, relay.baton, self.compute, self.lean, known)
        # What was kept is whole.
        return ys if known else self._whole(names, ys), relay.replace(baton=baton)

    def mlp(self, xs, weights, pairs, relay: Relay):
        """As Plain, but y is zeros: only its gradients are wanted, the next layer has its input."""
        kept, known = relay.kept, None
        if _low((UP, GATE)) in kept:
            lows = _cut((*kept[_low((UP, GATE))], *kept[_low((DOWN,))]))
            ys = kept[UP], kept[GATE]
            known = Known(*(ys if self.kernels else _cut(ys)), lows=lows)
        how = self.compute, self.lean, self.kernels
        y, baton = lora_mlp(xs, weights, pairs, relay.baton, *how, again=True, known=known)
        return y, relay.replace(baton=baton)

    def attend(self, q, k, v, kept: Kept, **rule):
        """As Plain."""
        if ATTENTION not in kept:
            return attention(q, k, v, **rule), kept
        return attention_again(q, k, v, *_cut(kept[ATTENTION]), **rule), kept

    def _out_of(self, kept: Kept | None) -> Layer | None:
        return None if kept is None else kept.get(OUT)


def _low(names: tuple[str, ...]) -> str:
    """Where the narrow products of these are kept."""
    return f"{LOW} {names[0]}"


def _cut(layers: Any) -> Any:
    return jax.tree.map(Layer.cut, layers, is_leaf=lambda x: isinstance(x, Layer))
