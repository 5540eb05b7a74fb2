"""Bytes that a device, or a disk, must hold, from the parameter table alone: no weights, any mesh.

A `Budget` is a list of named sizes with a limit: it prints itself and refuses what cannot fit, with
its numbers. What a program needs besides the weights it adds itself.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from qwen_jax import processes
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.params import abstract_params, param_table, tree_bytes
from qwen_jax.quant import QTensor, QuantFormat
from qwen_jax.sharding import MESH_AXES, describe_mesh

GB = 1e9


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    """A mesh of those sizes without devices: enough to know what each of them would hold."""
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of ShapeDtypeStructs on one device; whole where no sharding is given."""

    def size(x) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * np.dtype(x.dtype).itemsize

    return sum(size(x) for x in jax.tree.leaves(tree))


def weight_bytes(
    cfg: ModelConfig,
    dtype: Any,
    fmt: QuantFormat | None,
    sizes: dict[str, int],
    *,
    packed: bool = False,  # layers as generation on Hopper cards has them
) -> dict[str, int]:
    """Bytes of the parameters on one device, by kind, in the order of the table."""
    tree = abstract_params(cfg, dtype, fmt, abstract_mesh(sizes))
    layers, how = tree, ""
    if packed and sizes["fsdp"] > 1:
        layers = abstract_params(cfg, dtype, fmt, abstract_mesh(sizes | {"fsdp": 1}))
        how = ", packed: whole over fsdp"
    out: dict[str, int] = {}
    for spec in param_table(cfg):
        leaf = layers if spec.role == "linear" else tree
        for name in spec.path:
            leaf = leaf[name]
        kind = {"linear": "linear layers", "head": "lm_head"}.get(spec.role, spec.role)
        kind = "norms and biases" if spec.role in ("norm", "bias") else kind
        if isinstance(leaf, QTensor):
            parts = {f"{kind}, {leaf.kind} codes{how}": leaf.data}
            parts[f"their scales{how}"] = [leaf.scale, leaf.scale_absmax, leaf.scale_offset]
        else:
            parts = {kind + (how if spec.role == "linear" else ""): leaf}
        for name, part in parts.items():
            out[name] = out.get(name, 0) + device_bytes(part)
    return out


def replicated_share(
    cfg: ModelConfig, dtype: Any, fmt: QuantFormat | None, sizes: dict[str, int]
) -> str | None:
    """A line about the weights that an axis of the mesh does not divide; None if there are none."""
    tree = abstract_params(cfg, dtype, fmt, abstract_mesh(sizes))
    total, whole, names = 0, 0, []
    for spec in param_table(cfg):
        leaf = tree
        for name in spec.path:
            leaf = leaf[name]
        total += (size := tree_bytes(leaf))
        main = leaf.data if isinstance(leaf, QTensor) else leaf
        cut = {axis for part in main.sharding.spec if part for axis in np.ravel(part).tolist()}
        missing = [axis for axis in ("fsdp", "tensor") if sizes[axis] > 1 and axis not in cut]
        if missing and spec.role not in ("norm", "bias"):
            whole += size
            names.append(f"{spec.path[-1]} over {' and '.join(missing)}")
    if not names:
        return None
    return (
        f"mesh {describe_mesh(sizes)}: {whole / GB:.2f} of {total / GB:.2f} GB of weights are not "
        f"cut, the axis does not divide them ({', '.join(names)}): each of its devices holds all "
        "of them"
    )


def layer_values(cfg: ModelConfig) -> int:
    """Weights of the linear layers of one decoder layer: what is dequantized at a time."""
    return sum(math.prod(spec.shape) for spec in param_table(cfg) if spec.role == "linear")


@dataclasses.dataclass(frozen=True)
class Budget:
    """Named sizes in bytes in one place, and the bytes that it offers (0: unknown)."""

    items: dict[str, int]
    limit: int = 0
    place: str = "each device"

    @property
    def total(self) -> int:
        return sum(self.items.values())

    def describe(self) -> str:
        width = max(len(name) for name in self.items)
        lines = [f"  {name:<{width}}  {size / GB:8.2f} GB" for name, size in self.items.items()]
        offered = f" of {self.limit / GB:.2f} GB" if self.limit else ""
        return "\n".join([*lines, f"  {'sum':<{width}}  {self.total / GB:8.2f} GB{offered}"])

    def check(self, remedy: str) -> None:
        """InputError, with the largest items and what would help, if it cannot fit."""
        if self.limit and self.total > self.limit:
            largest = sorted(self.items.items(), key=lambda item: -item[1])[:3]
            named = ", ".join(f"{name} {size / GB:.1f} GB" for name, size in largest)
            raise InputError(
                f"this needs {self.total / GB:.1f} GB on {self.place} ({named}), which has "
                f"{self.limit / GB:.1f} GB; {remedy}"
            )


def device_limit(device: jax.Device) -> int:
    """Bytes that jax may allocate on a device; 0 where the backend does not say (CPU)."""
    return (device.memory_stats() or {}).get("bytes_limit", 0)


def mesh_limit(mesh: Mesh) -> int:
    """The same of the smallest device of a mesh, whichever process it belongs to."""
    smallest = min(device_limit(device) for device in mesh.local_devices) >> 20  # fits 32 bits
    # The smallest of all: what follows from it must be the same in every process.
    unused = 2**31 - 1
    return (unused - processes.most(unused - smallest)) << 20
