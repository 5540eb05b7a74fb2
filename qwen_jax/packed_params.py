"""The tree of packed weights that packed.py runs, made from that of params.py.

    params["layers"] = {"ln_1", "ln_2": [L, D],
                        "attn": {"wqkv": PackedWeight, "bqkv": [L, 3, N, H], "wo": PackedWeight},
                        "mlp": {"up_gate": PackedWeight, "down": PackedWeight}}

The rest of the tree is that of params.py. On a mesh every device packs its own slice of heads and
FFN columns (the tensor axis); over data and fsdp the packed weights are replicated. It runs no
model.
"""

import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from qwen_jax.cache import key_units
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.kernels.hopper import on_hopper
from qwen_jax.kernels.packing import (
    GROUPS,
    PackedWeight,
    Stack,
    can_pack,
    kind_of,
    pack,
    pack_slices,
    slice_layout,
)
from qwen_jax.memory import GB, device_limit
from qwen_jax.params import HEAD_AXES, tree_bytes
from qwen_jax.quant import QuantFormat, quantize
from qwen_jax.sharding import check_tensor_axis, partition_spec, tensor_size

Params = dict[str, Any]

_log = logging.getLogger(__name__)

_HEAD = QuantFormat.named("int8")
# The dimension of each weight, counted from the end, that the tensor axis cuts: heads, FFN columns.
CUT = {"wqkv": -3, "wo": -1, "up_gate": -2, "down": -1, "lm_head": -2}
# FFN columns are padded to whole blocks of this on each device: whole groups of every format.
_FFN_BLOCK = 128
# Rows of a packed weight, those of the head tokens, come in blocks of so many (see can_pack).
_HEAD_BLOCK = 16


def packable(params: Params, mesh: Mesh | AbstractMesh | None = None) -> bool:
    """Whether these weights have a format, and widths for this mesh, that `pack_params` takes."""
    attn, mlp = params["layers"]["attn"], params["layers"]["mlp"]
    fits = all(can_pack(w) for w in (attn["wqkv"], attn["wo"], *mlp.values()))
    return fits and not any(count % tensor_size(mesh) for count in _units(params).values())


def pays(params: Params, lora: Any, mesh: Mesh | None) -> bool:
    """Whether packing makes generation faster here: on Hopper cards, without an adapter.

    Packed weights are replicated over fsdp; where that would fill more than half of a card with
    them, they stay split. And they stay as they are where a card has no room to pack them: the
    largest, up and gate, are there twice for a moment, which matters for bf16.
    """
    if lora is not None or not on_hopper(params["wte"].dtype) or not packable(params):
        return False
    if obstacle := _obstacle(params, mesh):
        _log.warning("weights stay as they are, slower: %s", obstacle)
    return obstacle is None


def room_for_whole(layers: Params, mesh: Mesh | AbstractMesh, limit: int) -> bool:
    """Whether layers that are whole over fsdp leave half of a device of `limit` bytes free.

    Never where the limit is unknown (0).
    """
    return tree_bytes(layers) / tensor_size(mesh) < limit / 2


def _obstacle(params: Params, mesh: Mesh | None) -> str | None:
    """Why packable weights cannot be packed on this mesh; None if they can."""
    if not packable(params, mesh):
        have = " and ".join(f"{count} {name}" for name, count in _units(params).items())
        return f"tensor={tensor_size(mesh)} does not divide {have}, which packed ones need"
    limit = device_limit(jax.local_devices()[0])
    if mesh is None or mesh.shape["fsdp"] == 1:
        mlp = params["layers"]["mlp"]
        needed = tree_bytes([params, mlp["up"], mlp["gate"]]) / tensor_size(mesh)
        if not limit or needed < limit:
            return None
        return (
            f"while they are packed their largest are there twice, {needed / GB:.1f} GB of a "
            f"device's {limit / GB:.1f}"
        )
    if room_for_whole(params["layers"], mesh, limit):
        return None
    if not limit:
        return "packed ones are whole over fsdp, and the memory of a device is unknown"
    share = tree_bytes(params["layers"]) / tensor_size(mesh)
    return (
        f"packed ones are whole over fsdp, {share / GB:.1f} GB and more than half of a device's "
        f"{limit / GB:.1f}; give more of the mesh to tensor"
    )


def is_packed(params: Params) -> bool:
    return isinstance(params["layers"]["attn"]["wqkv"], PackedWeight)


def check_mesh(cfg: ModelConfig, params: Params, mesh: Mesh | None) -> None:
    """InputError if the packed weights are those of a mesh with another tensor axis."""
    rows = math.prod(params["layers"]["attn"]["wqkv"].out_shape)
    packed_for, size = 3 * cfg.attention_size // rows, tensor_size(mesh)
    if packed_for != size:
        raise InputError(
            f"the weights are packed for tensor={packed_for}, the mesh has tensor={size}; "
            "pack them for this mesh"
        )


def check_packing(params: Params, *, int8_head: bool, mesh: Mesh | None) -> None:
    """InputError unless the tensor axis divides heads and groups, and 16 the tokens of the head.

    `params` may be abstract: this can be asked before any weight is read.
    """
    tokens = params["lm_head"].shape[0]
    if int8_head and tokens % _HEAD_BLOCK:
        raise InputError(
            f"int8_head packs blocks of {_HEAD_BLOCK} tokens, and the vocabulary of this model has "
            f"{tokens}, no multiple of it; leave it out"
        )
    if tensor_size(mesh) > 1:
        check_tensor_axis(dict(mesh.shape), _units(params, int8_head))


def pack_params(
    params: Params, *, consume: bool = False, int8_head: bool = False, mesh: Mesh | None = None
) -> Params:
    """Reorders the weights of the layers; on a mesh, each device its own slice of heads and FFN.

    With `consume` each leaf is freed as soon as it is packed: memory then holds the model once and
    its largest leaf a second time. `int8_head` also quantizes the output head, one scale a token:
    half of the bytes that it costs a step, for a change of the logits. What `cache.key_units` takes
    off the keys and gives to the queries, so that an int8 cache holds them well, goes into their
    weight and bias here, once. Raises InputError as `check_packing` does.
    """
    check_packing(params, int8_head=int8_head, mesh=mesh)
    layers, one = params["layers"], functools.partial(_pack, mesh=mesh, consume=consume)
    attn, mlp = layers["attn"], layers["mlp"]
    unit = key_units(attn["bqkv"][:, 1])  # [L, N, H]
    factor = jnp.stack([unit, 1 / unit, jnp.ones_like(unit)], axis=1)  # [L, 3, N, H]
    head = params["lm_head"]
    if int8_head:
        quantized = jax.jit(lambda w: jax.tree.map(lambda x: x[None], quantize(w, _HEAD)))(head)
        head = _pack("lm_head", quantized, mesh=mesh, consume=True)
    return params | {
        "lm_head": head,
        "layers": {
            "ln_1": layers["ln_1"],
            "ln_2": layers["ln_2"],
            "attn": {
                "wqkv": one("wqkv", attn["wqkv"], factor=factor),
                "bqkv": attn["bqkv"] * factor,
                "wo": one("wo", attn["wo"]),
            },
            "mlp": {
                "up_gate": one("up_gate", mlp["up"], mlp["gate"]),
                "down": one("down", mlp["down"]),
            },
        },
    }


def _pack(
    name: str, *leaves: Stack, mesh: Mesh | None, consume: bool, factor: jax.Array | None = None
) -> PackedWeight:
    run, dim = pack, CUT[name]
    if mesh is not None and mesh.size > 1:
        size = leaves[0].shape[dim]
        if name in ("up_gate", "down"):
            size += -size % (_FFN_BLOCK * tensor_size(mesh))
        run = functools.partial(pack_slices, mesh=mesh, dim=dim, size=size)
    out = jax.jit(run)(*leaves, factor=factor)
    if consume:
        jax.block_until_ready(out)
        for array in jax.tree.leaves(leaves):
            array.delete()
    return out


def _units(params: Params, int8_head: bool = False) -> dict[str, int]:
    """What the tensor axis must divide."""
    wqkv, wo = params["layers"]["attn"]["wqkv"], params["layers"]["attn"]["wo"]
    group = GROUPS[kind_of(wo)] or 8
    units = {"heads": wqkv.shape[-3], f"groups of {group} inputs": wo.shape[-1] // group}
    if int8_head:
        units[f"blocks of {_HEAD_BLOCK} tokens"] = params["lm_head"].shape[0] // _HEAD_BLOCK
    return units


def layer_layout(layers: Params) -> Params:
    """The PartitionSpec of each array of params["layers"]."""

    def one(path: tuple, leaf: Any) -> Any:
        name = path[-1].key
        if isinstance(leaf, PackedWeight):
            return slice_layout(leaf, CUT[name])
        return PartitionSpec(None, None, "tensor") if name == "bqkv" else PartitionSpec()

    return jax.tree_util.tree_map_with_path(
        one, layers, is_leaf=lambda leaf: isinstance(leaf, PackedWeight)
    )


def head_layout(head: jax.Array | PackedWeight, mesh: Mesh) -> tuple[Any, Any]:
    """The same of the output head, and the mesh axes over which its tokens are split."""
    if isinstance(head, PackedWeight):
        return slice_layout(head, CUT["lm_head"]), "tensor"
    layout = partition_spec(HEAD_AXES, head.shape, mesh)
    return layout, layout[0]
