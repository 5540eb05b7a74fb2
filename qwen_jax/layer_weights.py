"""Weights of one layer at the moment of use: cut out of the stacks [L, ...], their slices joined.

On a mesh either the compiler cuts what a layer computes, or each device runs the layers by itself
(layer_loop.Share), and asks its neighbours for what it lacks. For both, what fsdp split is joined
here, as packed bytes. It knows where weights lie, not what is done with them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from qwen_jax.config import ModelConfig
from qwen_jax.kernels.hopper import say_once
from qwen_jax.kernels.qmatmul import Weight
from qwen_jax.layer_loop import Share
from qwen_jax.params import layer_specs, leaf_spec, param_table
from qwen_jax.quant import Layer, QTensor, QuantFormat
from qwen_jax.sharding import batch_spec, constrain, joined, split_dims

Tree = dict[str, Any]


def one_layer(layers: Tree, index: jax.Array, mesh: Mesh | None) -> Tree:
    """One layer of the stacks. Indexed here, inside the loop: as scan inputs, a run of some of the
    layers would first be copied out of the stacks, gigabytes of it.

    On one device quantized weights stay where they are, for the kernel that reads them there.
    """

    def cut(stack: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(stack, index, 0, keepdims=False)

    def one(stack: jax.Array | QTensor) -> Weight:
        if is_quantized(stack) and (mesh is None or mesh.size == 1):
            return Layer(stack=stack, index=index)
        return jax.tree.map(cut, stack)

    return jax.tree.map(one, layers, is_leaf=is_quantized)


def whole_layer(cfg: ModelConfig, layers: Tree, index: jax.Array, mesh: Mesh | None) -> Tree:
    """one_layer where the compiler cuts what a layer computes: the slices of fsdp are joined."""
    w = one_layer(layers, index, mesh)
    if mesh is None or mesh.shape["fsdp"] == 1:
        return w
    cut, whole = _specs_of(cfg, layers, mesh), _specs_of(cfg, layers, mesh, ("fsdp",))
    join = functools.partial(_join, specs=cut)
    return jax.shard_map(join, mesh=mesh, in_specs=(cut,), out_specs=whole, check_vma=False)(w)


def _join(w: Tree, specs: Tree) -> Tree:
    """On one device: a layer's weights, of which it has slices, whole over fsdp."""
    return jax.tree.map(lambda x, spec: joined(x, spec, "fsdp"), w, specs)


def joined_layer(cfg: ModelConfig, layers: Tree, index: jax.Array, mesh: Mesh) -> Tree:
    """one_layer on one device of a mesh, which has slices of the stacks."""
    if mesh.shape["fsdp"] == 1:
        return one_layer(layers, index, None)
    w = _join(one_layer(layers, index, mesh), _specs_of(cfg, layers, mesh))

    def one(w: jax.Array | QTensor) -> Weight:
        if not is_quantized(w):
            return w
        return Layer(stack=jax.tree.map(lambda x: x[None], w), index=jnp.int32(0))

    return jax.tree.map(one, w, is_leaf=is_quantized)


def joined_pairs(cfg: ModelConfig, pairs: Tree, mesh: Mesh | None) -> Tree:
    """Joins the fsdp slices of LoRA (as model.lora_layers gives it), once for all layers.

    190 MB at 72B and rank 8. Left in slices, XLA multiplies with each of them where it lies and
    exchanges the results, 0.3 GB a layer at 2,048 tokens of 72B.
    """
    if mesh is None or mesh.shape["fsdp"] == 1:
        return pairs
    specs = _pair_specs(cfg, pairs, mesh)
    return jax.tree.map(lambda x, spec: constrain(x, mesh, spec), pairs, specs)


def share_of(
    cfg: ModelConfig,
    layers: Tree,
    others: Any,  # arrays [B, ...] that layers read
    pairs: Tree,  # LoRA with its fsdp slices joined
    mesh: Mesh | None,
) -> Share | None:
    """How each device of a mesh runs layers by itself, with joined_layer.

    None on one device, and where that cannot be: then the compiler cuts layers, without kernels.
    """
    if mesh is None or mesh.size == 1:
        return None
    specs = _specs_of(cfg, layers, mesh)
    obstacle = _obstacle(cfg, layers, specs) if mesh.shape["tensor"] > 1 else ""
    if obstacle:
        say_once(f"layers of training run without kernels: {obstacle}")
        return None
    stacked = jax.tree.map(lambda _, spec: PartitionSpec(None, *spec), layers, specs)
    rows = jax.tree.map(lambda _: batch_spec(), others)
    return Share(mesh=mesh, low=_pair_specs(cfg, pairs, mesh), frozen=(stacked, *rows))


def _obstacle(cfg: ModelConfig, layers: Tree, specs: Tree) -> str:
    """Why devices of a tensor axis cannot have a share of each weight; empty if they can."""
    fmt = _format_of(layers)
    if fmt is not None and fmt.kind == "nf4":
        # Scales are counted through the whole weight, in blocks that have one absmax each.
        return "a tensor axis would cut the blocks of nf4's scales"
    for spec in param_table(cfg):
        if spec.lora_target:
            layout = specs[spec.path[1]][spec.path[2]]
            layout = layout.data if is_quantized(layout) else layout
            if not split_dims(layout, "tensor"):
                return f"the tensor axis does not divide {spec.path[-1]}"
    return ""


def is_quantized(w: Any) -> bool:
    return isinstance(w, QTensor)


def _format_of(layers: Tree) -> QuantFormat | None:
    w = layers["attn"]["wqkv"]
    if not is_quantized(w):
        return None
    # One scale a row is in float32 (QuantFormat.shapes); one group a row may be all of a small one.
    whole = w.kind == "int8" and w.scale.dtype == jnp.float32
    return QuantFormat(kind=w.kind, group=0 if whole else w.in_size // w.scale.shape[-1])


def _specs_of(cfg: ModelConfig, layers: Tree, mesh: Mesh, without: tuple[str, ...] = ()) -> Tree:
    """params.layer_specs of these layers, whose bounds lie everywhere."""

    def with_bound(w: Any, spec: Any) -> Any:
        known = is_quantized(w) and w.bound is not None
        return spec.replace(bound=PartitionSpec()) if known else spec

    specs = layer_specs(cfg, _format_of(layers), mesh, without)
    return jax.tree.map(with_bound, layers, specs, is_leaf=is_quantized)


def _pair_specs(cfg: ModelConfig, pairs: Tree, mesh: Mesh) -> Tree:
    """Layouts of LoRA as model.lora_layers gives it, with its fsdp slices joined."""
    layouts = {spec.path[1:]: leaf_spec(spec, mesh, None, ("fsdp",)) for spec in param_table(cfg)}

    def of(layout: PartitionSpec) -> Tree:
        return {
            "a": PartitionSpec(None, None, layout[-1]),
            "b": PartitionSpec(None, None, *layout[:-1]),
        }

    return {
        block: {name: of(layouts[block, name]) for name in inside}
        for block, inside in pairs.items()
    }
