"""Where arrays lie on a mesh of devices: three mesh axes and the rules that map names onto them.

    data    copies of the model; each takes its own rows of the batch
    fsdp    each device keeps a slice of every weight and gathers the rest layer by layer;
            it takes its own rows of the batch too
    tensor  heads and FFN columns are split; all devices of the axis see the same rows

Weights say which logical axes they have (params.py); this file alone knows what a logical axis
means on the mesh. It does not know the model. The fsdp axis always lies on an *output* dimension
of a weight, so that it never cuts a quantization group (those run along the input).
"""

import math
import os

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwen_jax.errors import InputError, UsageError, did_you_mean

MESH_AXES = ("data", "fsdp", "tensor")

# logical axis -> mesh axes, major first. What is not listed is not split.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "heads": ("tensor",),  # N; also the merged N*H of the attention output
    "head_dim": ("fsdp",),  # H of the packed query/key/value weight
    "ffn": ("tensor", "fsdp"),  # F as an output
    "ffn_in": ("tensor",),  # F as an input (down projection)
    "embed_out": ("fsdp",),  # D as an output
    "vocab": ("tensor", "fsdp"),
    "vocab_in": ("tensor",),  # rows of the embedding table
}

# With no GPU, a mesh of up to this many virtual CPU devices is made on request. More of them on a
# few cores starve XLA's collectives; XLA_FLAGS=--xla_force_host_platform_device_count=N overrides.
MAX_VIRTUAL_DEVICES = 8


def parse_mesh(text: str, bare_axis: str = "fsdp") -> dict[str, int]:
    """Parses `--mesh`: `8` (all on `bare_axis`) or `data=2,fsdp=2,tensor=2`.

    Returns the size of every mesh axis, 1 where not named. Raises UsageError on anything else.
    """
    sizes: dict[str, int] = {}
    for part in (text or "1").split(","):
        name, equals, number = part.strip().partition("=")
        if not equals and "," not in text:
            name, number = bare_axis, name
        if name not in MESH_AXES:
            raise UsageError(
                f"--mesh {text!r}: unknown axis {name!r}{did_you_mean(name, MESH_AXES)}; expected "
                "a number of devices or sizes such as data=2,fsdp=2,tensor=2"
            )
        if not number.isascii() or not number.isdigit() or int(number) < 1:
            raise UsageError(f"--mesh {text!r}: {number!r} is not a whole number over 0")
        if name in sizes:
            raise UsageError(f"--mesh {text!r}: {name} stands twice")
        sizes[name] = int(number)
    return dict.fromkeys(MESH_AXES, 1) | sizes


def check_tensor_axis(sizes: dict[str, int], units: dict[str, int]) -> None:
    """InputError unless the tensor axis divides all of `units` (a name -> how many there are).

    What it does not divide would be replicated: many devices with the work and memory of one.
    """
    tensor = sizes["tensor"]
    wrong = {name: count for name, count in units.items() if count % tensor}
    if wrong:
        largest = math.gcd(tensor, *units.values())
        have = " and ".join(f"{count} {name}" for name, count in units.items())
        raise InputError(
            f"--mesh {describe_mesh(sizes)}: tensor={tensor} must divide the {have} of this model; "
            f"use tensor={largest} and give the other devices to fsdp or data"
        )


def provide_devices(count: int) -> None:
    """Asks for `count` virtual CPU devices, if no backend runs yet; a GPU machine is unaffected."""
    flags = os.environ.get("XLA_FLAGS", "")
    if count > 1 and "xla_force_host_platform_device_count" not in flags:
        count = max(min(count, MAX_VIRTUAL_DEVICES), jax.config.jax_num_cpu_devices)
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:  # a backend runs already; make_mesh counts what it has
            return


def make_mesh(sizes: dict[str, int]) -> Mesh:
    """Builds the mesh from the first devices; InputError if there are too few.

    Several processes must use all of theirs: one without a device of the mesh could not take part.
    """
    count = math.prod(sizes.values())
    provide_devices(count)
    devices = jax.devices()
    if count > len(devices):
        raise InputError(
            f"the mesh {describe_mesh(sizes)} needs {count} devices, "
            f"{'this machine has' if jax.process_count() == 1 else 'all processes have'} "
            f"{len(devices)} ({devices[0].platform}); use a smaller --mesh"
        )
    if count < len(devices) and jax.process_count() > 1:
        raise InputError(
            f"the mesh {describe_mesh(sizes)} has {count} devices, the {jax.process_count()} "
            f"processes have {len(devices)}; give --mesh all of them"
        )
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    # The default became Explicit axes, under which the embedding gather raises.
    auto = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=auto, devices=devices[:count])


def describe_mesh(sizes: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def partition_spec(
    axes: tuple[str | None, ...],
    units: tuple[int, ...],
    mesh: Mesh,
    without: tuple[str, ...] = (),
) -> PartitionSpec:
    """Maps logical axes to mesh axes.

    `units[i]` is how many indivisible units dimension i has (elements, or quantization groups).
    A mesh axis that does not divide them is left out: that dimension is then replicated over it,
    which costs memory, never correctness. `without` drops mesh axes: the layout after a gather.
    """
    spec: list = []
    for name, count in zip(axes, units, strict=True):
        chosen = []
        for axis in RULES.get(name, ()) if name else ():
            size = mesh.shape[axis]
            if axis not in without and size > 1 and count % size == 0:
                chosen.append(axis)
                count //= size
        spec.append(tuple(chosen) if len(chosen) > 1 else (chosen[0] if chosen else None))
    return PartitionSpec(*spec)


def batch_spec() -> PartitionSpec:
    """Rows of a batch: split over data and fsdp."""
    return PartitionSpec(RULES["batch"])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def tensor_size(mesh: Mesh | None) -> int:
    """Devices over which heads and FFN columns are split."""
    return 1 if mesh is None else mesh.shape["tensor"]


def split_dims(spec: PartitionSpec, axis: str) -> list[int]:
    """The dimensions that a mesh axis splits."""
    names = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    return [dim for dim, inside in enumerate(names) if axis in inside]


def joined(x: jax.Array, spec: PartitionSpec, axis: str) -> jax.Array:
    """On a device of a mesh: its slice of an array with the slices of the others of `axis`.

    They arrive one behind another, and are interleaved here where that is not their order. Asked to
    do that itself, XLA turns what is gathered beforehand: a whole stack of layers, each step.
    """
    for dim in split_dims(spec, axis):
        slices = jax.lax.all_gather(x, axis)  # [devices, ...]
        whole = len(slices) * x.shape[dim]
        x = jnp.moveaxis(slices, 0, dim).reshape(*x.shape[:dim], whole, *x.shape[dim + 1 :])
    return x


def constrain(x: jax.Array, mesh: Mesh | None, spec: PartitionSpec) -> jax.Array:
    """Pins the layout of an intermediate; without a mesh it is the identity."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
