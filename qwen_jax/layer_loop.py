"""Layers one after another in training: what each keeps for the backward pass, and that pass.

    forward   x -> layer 0 -> layer 1 -> ...     each writes its result, and what its level names
                                                 (remat.py), into its place of a stack [L, ...]
    backward  each layer, last to first, is run again with what it kept in place of what made it,
              and differentiated

By hand, because jax.lax.scan stacks what its body keeps: at 72B and 2,048 tokens it copies 0.4 GB a
layer to where it is kept, and first fills the 29 GB of all layers with zeros. Here the kernel of a
product writes straight to its place.

On a mesh, too, each device runs all layers by itself, on its rows of the batch and its share of
heads and FFN columns, because no compiler can cut kernels. What it lacks of a layer's weights it
gets from its neighbours (the layer does that), and gradients of LoRA are added up here.

How a layer computes is the business of its mode: layer_modes.py. This file knows stacks, not what
a layer is.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from qwen_jax.kernels.hopper import on_hopper
from qwen_jax.kernels.unfilled import unfilled
from qwen_jax.layer_modes import Keeping, Kept, Plain, Recalling
from qwen_jax.quant import Layer
from qwen_jax.remat import SAVED
from qwen_jax.sharding import MESH_AXES, batch_spec, split_dims

# [L, B, ...] of which each device of a mesh has its own, as one array: nothing is sent.
_STACKS = PartitionSpec(None, MESH_AXES)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Share:
    """How layers are cut over a mesh whose devices run all of them: layouts of what they read."""

    mesh: Mesh
    low: Any  # PartitionSpec of each leaf, layer axis included; fsdp splits none of them
    frozen: Any

    @property
    def tensor(self) -> str | None:
        return "tensor" if self.mesh.shape["tensor"] > 1 else None

    def add_up(self, gradient: Any) -> Any:
        """Gradients of one layer's low, of which each device has a part, in float32.

        Barriers, because XLA:GPU joins sums that it may make at once, then moves conversions from
        and to bfloat16 to the other side of some of them, and last takes all for one array of the
        first one's dtype: gradients of a run of one layer, joined with the sum of the loss, were
        garbage on two cards (jax 0.11.2).
        """
        barrier = jax.lax.optimization_barrier

        def one(g: jax.Array, layout: PartitionSpec) -> jax.Array:
            shape = self.mesh.shape
            axes = [name for name in shape if shape[name] > 1 and not split_dims(layout, name)]
            return barrier(jax.lax.psum(barrier(g.astype(jnp.float32)), axes)).astype(g.dtype)

        return jax.tree.map(one, gradient, self.low)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """Layers start .. stop - 1, all alike."""

    # (mode, x [B, T, D], index int32 [], low, frozen, kept) -> (x, kept)
    layer: Callable[..., tuple[jax.Array, Kept]]
    start: int
    stop: int
    level: str = "full"  # of remat.LEVELS
    compute: str = "bf16"
    alone: bool = True  # on one device
    share: Share | None = None  # on each device of a mesh by itself; else the compiler cuts layers
    lean: bool = False  # of Plain

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def kernels(self) -> bool:
        """Whether kernels may run."""
        return self.alone or self.share is not None

    def place(self, inputs: jax.Array, index: jax.Array) -> Layer | None:
        """Where kernels find the input of a layer."""
        return Layer(stack=inputs, index=index) if self.kernels else None

    def on_each_device(
        self, function: Callable, takes: tuple[str, ...], gives: tuple[str, ...]
    ) -> Callable:
        """A function of (run, ...), on each device of a mesh with its own part of what it takes:
        rows [B, ...], stacks [L, B, ...] of them, low or frozen.
        """
        function = functools.partial(function, self)
        if self.share is None:
            return function
        layouts = {
            "rows": batch_spec(), "stacks": _STACKS, "low": self.share.low,
            "frozen": self.share.frozen,
        }  # fmt: skip
        in_specs, out_specs = (tuple(layouts[name] for name in names) for names in (takes, gives))
        return jax.shard_map(
            function, mesh=self.share.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def mode(self, kind: type[Plain], **more: Any) -> Plain:
        """A mode of this run."""
        tensor = self.share.tensor if self.share else None
        return kind(
            compute=self.compute, lean=self.lean, kernels=self.kernels, tensor=tensor, **more
        )  # fmt: skip


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


# What cuts a layer out of its stack and joins its slices.
_OF_WEIGHTS = ("dynamic_slice", "squeeze", "all_gather", "transpose", "reshape", "shard_map")


def _all_but_weights(primitive, *_, **__) -> bool:
    """A weight lies in its stack: kept once more, what is cut out of that for a layer, or what a
    mesh gathers of the cut, would double it. What else these make is made again in no time.
    """
    return primitive.name not in _OF_WEIGHTS


def _scan(run: Run, x, low, frozen, wrap=lambda body: body):
    mode = run.mode(Plain)

    def body(x, per_layer):
        index, low = per_layer
        return run.layer(mode, x, index, low, frozen, {})[0], None

    return jax.lax.scan(wrap(body), x, (jnp.arange(run.start, run.stop), low))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run_again(run: Run, x, low, frozen):
    """run_layers, with a backward pass that runs each layer again from what it kept."""
    scan = run.on_each_device(lambda *given: (_scan(*given),), ("rows", "low", "frozen"), ("rows",))
    return scan(x, low, frozen)[0]


def _forward(run: Run, x, low, frozen):
    there = run.on_each_device(_forward_pass, ("rows", "low", "frozen"), ("rows", "stacks"))
    x, stacks = there(x, low, frozen)
    return x, (stacks, low, frozen)


def _forward_pass(run: Run, x, low, frozen):
    """On one device: the result, and stacks of all inputs and of what was kept."""
    mode = run.mode(Keeping, names=SAVED[run.level])

    def shapes(low):
        first = jax.tree.map(lambda stack: stack[0], low)
        return run.layer(mode, x, jnp.int32(run.start), first, frozen, {})[1]

    kernels = run.kernels and on_hopper(x.dtype)

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
    return inputs[run.count], (inputs, kept)


def _backward(run: Run, residuals, gradient):
    takes = ("stacks", "low", "frozen", "rows")
    back = run.on_each_device(_backward_pass, takes, ("rows", "low"))
    return *back(*residuals, gradient), None


def _backward_pass(run: Run, stacks, low, frozen, gradient):
    """On one device: gradients of x and of low."""
    inputs, kept = stacks
    mode = run.mode(Recalling)

    def body(gradient, per_layer):
        index, low = per_layer
        own = jax.tree.map(lambda stack: Layer(stack=stack, index=index), kept)
        here = dataclasses.replace(mode, place=run.place(inputs, index))

        def again(x, low):
            return run.layer(here, x, run.start + index, low, frozen, own)[0]

        with jax.named_scope("again"):
            _, pullback = jax.vjp(again, inputs[index], low)
            gradient, of_low = pullback(gradient)
        return gradient, of_low if run.share is None else run.share.add_up(of_low)

    return jax.lax.scan(body, gradient, (jnp.arange(run.count), low), reverse=True)


_run_again.defvjp(_forward, _backward)
