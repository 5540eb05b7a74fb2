"""Layers one after another in training: what each keeps for the backward pass, and that pass.

    forward   x -> layer 0 -> layer 1 -> ...     each writes its result, and what its level names
                                                 (remat.py), into its place of a stack [L, ...]
    backward  each layer, last to first, is run again with what it kept in place of what made it,
              and differentiated

By hand, because jax.lax.scan stacks what its body keeps: at 72B and 2,048 tokens it copies 0.4 GB a
layer to where it is kept, and first fills the 29 GB of all layers with zeros. Here the kernel of a
product writes straight to its place.

A layer is a function of (mode, x, index, low, frozen, kept) -> (x, kept). It leaves its products
and its attention to the mode, which is what differs: Plain computes, Keeping computes and writes
to kept, Recalling takes from there. This file knows names and stacks, not what a layer is.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from qwen_jax.kernels.attention import attention, attention_again, attention_and_statistics
from qwen_jax.kernels.hopper import on_hopper
from qwen_jax.kernels.lora_matmul import lora_matmul, products
from qwen_jax.kernels.lora_mlp import Known, down_products, lora_mlp
from qwen_jax.kernels.rms_norm import add_behind, residual_rms_norm
from qwen_jax.kernels.unfilled import unfilled
from qwen_jax.quant import Layer, written
from qwen_jax.remat import ATTENTION, DOWN, GATE, LOW, OUT, SAVED, UP

Kept = dict[str, Any]  # name -> what products or attention gave, or the stacks of it


@struct.dataclass
class Relay:
    """What goes from one product of a layer to the next."""

    baton: jax.Array  # float32 []: kernels/lora_matmul.py
    kept: Any  # of a mode; with a cache, the cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
    """Computes, and keeps nothing."""

    compute: str = "bf16"  # "fp8": products with frozen weights in e4m3
    lean: bool = False  # dequantizes once more for gradients, rather than hold a layer's weights
    alone: bool = False  # on one device, so that kernels may run
    place: Layer | None = None  # where the layer's input lies, on one device

    def norm(self, x, y, weight, eps: float, readers: int = 1, kept: Any = None):
        """x (+ y) [B, T, D], and its norm for each of the readers: kernels/rms_norm.py.

        y is what OUT names: `kept` says where it lies.
        """
        where = {"place": self.place, "y_place": self._out_of(kept)}
        return residual_rms_norm(x, y, weight, eps, readers=readers, **where)

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
        return ys, relay.replace(baton=baton)

    def mlp(self, xs, weights, pairs, relay: Relay):
        """down(up(x) * silu(gate(x))) for the weights up, gate and down: y [B, T, D] and the relay.
        x comes twice, as norm gives it.
        """
        how = self.compute, self.lean, self.alone
        y, baton = lora_mlp(xs, weights, pairs, relay.baton, *how)
        return y, relay.replace(baton=baton)

    def attend(self, q, k, v, kept: Kept, **rule):
        """Attention under the rule of kernels/attention.py: y [B, T, N, H] and kept."""
        return attention(q, k, v, **rule), kept


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
            into = tuple(self._place(kept[name]) if name in self.names else None for name in names)
        made = products(x, weights, pairs, relay.baton, self.compute, into)
        ys = []
        for name, y in zip(names, made.ys, strict=True):
            if isinstance(y, Layer):
                kept = {**kept, name: y.stack}
                y = y.cut()
            elif name in self.names:
                kept = {**kept, name: y}
            ys.append(y)
        if LOW in self.names:
            kept = self._write(_low(names), made.lows, kept)
        return tuple(ys), Relay(baton=made.baton, kept=kept)

    def mlp(self, xs, weights, pairs, relay: Relay):
        """As Plain."""
        names = (UP, GATE)
        ys, relay = self.multiply(names, xs[0], weights[:2], pairs[:2], relay)
        kept = relay.kept
        if self.index is not None and self.alone:  # a kernel reads them where they lie
            ys = [
                self._place(kept[name]) if name in self.names else y
                for name, y in zip(names, ys, strict=True)
            ]
        made = down_products(*ys, weights[2], pairs[2], relay.baton, self.compute, self.alone)
        if LOW in self.names:
            kept = self._write(_low((DOWN,)), made.lows, kept)
        return made.ys[0], Relay(baton=made.baton, kept=kept)

    def attend(self, q, k, v, kept: Kept, **rule):
        """As Plain."""
        if ATTENTION not in self.names:
            return attention(q, k, v, **rule), kept
        y, statistics = attention_and_statistics(q, k, v, **rule)
        return y, self._write(ATTENTION, (y, statistics), kept)

    def add(self, x, y):
        """As Plain; on one device written to its place, behind the input of this layer."""
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
        return ys, relay.replace(baton=baton)

    def mlp(self, xs, weights, pairs, relay: Relay):
        """As Plain, but y is zeros: only its gradients are wanted, the next layer has its input."""
        kept, known = relay.kept, None
        if _low((UP, GATE)) in kept:
            lows = _cut((*kept[_low((UP, GATE))], *kept[_low((DOWN,))]))
            ys = kept[UP], kept[GATE]
            known = Known(*(ys if self.alone else _cut(ys)), lows=lows)
        how = self.compute, self.lean, self.alone
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Layers start .. stop - 1, all alike."""

    # (mode, x [B, T, D], index int32 [], low, frozen, kept) -> (x, kept)
    layer: Callable[..., tuple[jax.Array, Kept]]
    start: int
    stop: int
    level: str = "full"  # of remat.LEVELS
    compute: str = "bf16"
    alone: bool = True  # on one device, so that kernels may run
    lean: bool = False  # of Plain

    @property
    def count(self) -> int:
        return self.stop - self.start

    def place(self, inputs: jax.Array, index: jax.Array) -> Layer | None:
        """Where kernels find the input of a layer."""
        return Layer(stack=inputs, index=index) if self.alone else None


def run_layers(
    run: Run,
    x: jax.Array,  # [B, T, D]
    low: Any,  # LoRA pairs of these layers, stacked [count, ...]
    frozen: Any,  # what layers read and get no gradient for
) -> jax.Array:  # [B, T, D]
    """x after these layers."""
    if run.level == "none":
        keep = functools.partial(jax.checkpoint, policy=_all_but_weights, prevent_cse=False)
        return _scan(dataclasses.replace(run, lean=True), x, low, frozen, keep)
    return _run_again(run, x, low, frozen)


def _all_but_weights(primitive, *_, **__) -> bool:
    """A weight lies in its stack: kept once more, what is cut out of that for a layer, or what a
    mesh gathers of the cut, would double it. What else these make is made again in no time.
    """
    return primitive.name not in ("dynamic_slice", "squeeze", "sharding_constraint")


def _scan(run: Run, x, low, frozen, wrap=lambda body: body):
    mode = Plain(compute=run.compute, lean=run.lean, alone=run.alone)

    def body(x, per_layer):
        index, low = per_layer
        return run.layer(mode, x, index, low, frozen, {})[0], None

    return jax.lax.scan(wrap(body), x, (jnp.arange(run.start, run.stop), low))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run_again(run: Run, x, low, frozen):
    """run_layers, with a backward pass that runs each layer again from what it kept."""
    return _scan(run, x, low, frozen)


def _forward(run: Run, x, low, frozen):
    mode = Keeping(names=SAVED[run.level], compute=run.compute, alone=run.alone)

    def shapes(low):
        first = jax.tree.map(lambda stack: stack[0], low)
        return run.layer(mode, x, jnp.int32(run.start), first, frozen, {})[1]

    kernels = run.alone and on_hopper(x.dtype)

    def stack_of(value, count: int = run.count):
        return unfilled((count, *value.shape), value.dtype, kernels=kernels)

    kept = jax.tree.map(stack_of, jax.eval_shape(shapes, low))
    inputs = stack_of(x, run.count + 1).at[0].set(x)

    def body(carry, per_layer):
        # x is not carried by itself: it would be copied from there to its place.
        inputs, kept = carry
        index, low = per_layer
        here = dataclasses.replace(mode, index=index, place=run.place(inputs, index))
        x, kept = run.layer(here, inputs[index], run.start + index, low, frozen, kept)
        inputs = x.stack if isinstance(x, Layer) else inputs.at[index + 1].set(x)
        return (inputs, kept), None

    (inputs, kept), _ = jax.lax.scan(body, (inputs, kept), (jnp.arange(run.count), low))
    return inputs[run.count], (inputs, kept, low, frozen)


def _backward(run: Run, residuals, gradient):
    inputs, kept, low, frozen = residuals
    mode = Recalling(compute=run.compute, lean=run.lean, alone=run.alone)

    def body(gradient, per_layer):
        index, low = per_layer
        own = jax.tree.map(lambda stack: Layer(stack=stack, index=index), kept)
        here = dataclasses.replace(mode, place=run.place(inputs, index))

        def again(x, low):
            return run.layer(here, x, run.start + index, low, frozen, own)[0]

        with jax.named_scope("again"):
            _, pullback = jax.vjp(again, inputs[index], low)
            return pullback(gradient)

    per_layer = (jnp.arange(run.count), low)
    gradient, low_gradient = jax.lax.scan(body, gradient, per_layer, reverse=True)
    return gradient, low_gradient, None


_run_again.defvjp(_forward, _backward)
