"""Which card the kernels run on: the one place that asks; and what was chosen for it, said once."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

_log = logging.getLogger(__name__)
_assumed = False  # by as_on_a_card


@contextlib.contextmanager
def as_on_a_card() -> Iterator[None]:
    """What is traced in here is for a Hopper card, which need not be there: to compile for it.

    jax knows nothing of it: a jitted function that was traced outside stays as it was traced.
    """
    global _assumed
    before, _assumed = _assumed, True
    try:
        yield
    finally:
        _assumed = before


def on_gpu() -> bool:
    """Whether programs run on a GPU, or are compiled for one."""
    return _assumed or jax.default_backend() == "gpu"


def is_hopper() -> bool:
    """Whether the default device has compute capability 9.0, for which the kernels are written."""
    if _assumed:
        return True
    if jax.default_backend() != "gpu":
        return False
    return str(jax.local_devices()[0].compute_capability) == "9.0"


def multiprocessors() -> int:
    """Of the default device if it is a GPU; else those of an H100, for which it may be compiled."""
    return jax.local_devices()[0].core_count if jax.default_backend() == "gpu" else 132


def on_hopper(dtype: jnp.dtype) -> bool:
    """Whether the kernels that compute in bfloat16 run here on activations of `dtype`."""
    return dtype == jnp.bfloat16 and is_hopper()


@functools.cache
def say_once(line: str) -> None:
    """Logs a line the first time that it is true: which implementation of a kernel runs."""
    _log.info(line)


def served(use: str, check: Callable[[], object]) -> bool:
    """Whether a kernel serves the use: `check` raises NotImplementedError if not. Says so once."""
    try:
        check()
    except NotImplementedError as e:
        say_once(f"{use} on xla ({e})")
        return False
    say_once(f"{use} on mosaic")
    return True
