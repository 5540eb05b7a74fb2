"""How the exchange between GPUs is hidden behind computation: options of XLA for one program.

    none      XLA's defaults (by its source, the latency hiding scheduler is off)
    schedule  that scheduler on: the five gathers of a layer start with the layer, and the products
              of one weight run while the next one arrives, so that only the first is waited for.
              Gathers of codes are not joined, which would make all products wait for all of them.
    pipeline  the gathers of the next layer start within this one as well; the packed weights of two
              layers are then held at once (0.5 GB each at 72B), and the loop is unrolled twice,
              since carrying them over would copy them. From jax 0.11 on XLA has no option for the
              former, and only unrolls

They are options of the compiled program, so the user's XLA_FLAGS stay as they are. Of several GPUs
only `schedule` was measured, on two; `benchmarks.scaling --overlap` compares. On one GPU there is
nothing to exchange. There, all but `none` run at once the kernels that do not wait for each other:
weights are dequantized while a product runs (kernels/lora_matmul.py). Buffers are then shared less,
0.5 to 1.8 GB more at 72B, so `auto` does it only where it pays (step.at_once_pays).
"""

import functools
import logging

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

OVERLAP = ("auto", "none", "schedule", "pipeline")

# Over the scales of a 72B weight (3 MB), which may travel together; under its codes (from 33 MB).
_JOIN_BYTES = 32 * 2**20
Option = bool | int | str
_SCHEDULE: dict[str, Option] = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_all_gather_combine_threshold_bytes": _JOIN_BYTES,
    "xla_gpu_experimental_enable_heuristic_collective_combining": False,
}
_PIPELINE = _SCHEDULE | {
    "xla_gpu_enable_pipelined_all_gather": True,
    "xla_gpu_enable_while_loop_double_buffering": True,
}
# XLA would fuse a kernel of ours with the copy of its result to where jax.lax.scan keeps it (as of
# level `none` it still does), and run it a second time for whoever else reads that result.
_EVERYWHERE: dict[str, Option] = {"xla_gpu_enable_dynamic_slice_fusion": False}
_AT_ONCE: dict[str, Option] = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
# Sums over devices by NCCL alone. A precaution: on two cards 80 layers cut over `tensor` learned
# something else than on one, where all that the program had and programs with the right gradients
# had not were small sums in a loop by XLA's own kernels (docs/benchmarks.md). By its source,
# versions that do not know the option have those off by default.
_BY_NCCL: dict[str, Option] = {"xla_gpu_experimental_use_collective_kernels": ""}
_OPTIONS: dict[str, dict[str, Option]] = {
    "none": {},
    "schedule": _SCHEDULE,
    "pipeline": _PIPELINE,
}

_log = logging.getLogger(__name__)
_UNKNOWN = ("No such compile option", "not a valid enum value")


def compiler_options(
    mesh: Mesh, overlap: str = "auto", *, at_once: bool = True
) -> dict[str, Option]:
    """Options for jax.jit of a step over `mesh`; none on anything but GPUs.

    `auto` is `schedule`, or on one device `none` if running kernels `at_once` does not pay. An
    option that this jaxlib does not know is left out, and said if the step may be slower for it.
    """
    if overlap not in OVERLAP:
        raise ValueError(f"overlap {overlap!r}: expected one of {', '.join(OVERLAP)}")
    if mesh.devices.flat[0].platform != "gpu":
        return {}
    if mesh.size == 1:
        apart = overlap == "none" or (overlap == "auto" and not at_once)
        wanted = _EVERYWHERE | ({} if apart else _AT_ONCE)
    else:
        wanted = _EVERYWHERE | _OPTIONS["schedule" if overlap == "auto" else overlap] | _BY_NCCL
    options = {name: value for name, value in wanted.items() if known(name, value)}
    for name, value in wanted.items():
        if name not in options and name not in _BY_NCCL:
            _say_unknown(name, value)
    return options


@functools.cache
def _say_unknown(name: str, value: Option) -> None:
    _log.warning("this jaxlib does not know %s=%s: a step may be slower", name, value)


@functools.cache
def known(name: str, value: Option) -> bool:
    """Whether this jaxlib takes the option: names come and go with its versions."""
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(jnp.zeros(())).compile()
    except jax.errors.JaxRuntimeError as error:
        if not any(reason in str(error) for reason in _UNKNOWN):
            raise
        return False
    return True
