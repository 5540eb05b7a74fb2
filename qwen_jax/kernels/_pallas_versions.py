"""What differs between the versions of jax that the kernels are written for, 0.10 to 0.12."""

import functools
import inspect
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu


def load(ref: Any, index: tuple, **options: Any) -> jax.Array:
    """ref[index] as plgpu.load gives it: the index was an argument once, now the reference has it.

    0.11 takes both, and warns of the argument.
    """
    if _takes_index():
        return plgpu.load(ref, index, **options)
    return plgpu.load(ref.at[index], **options)


@functools.cache
def _takes_index() -> bool:
    index = inspect.signature(plgpu.load).parameters.get("idx")
    return index is not None and index.default is inspect.Parameter.empty
