"""Eight virtual CPU devices for every test, and quick compiles: on the CPU these are most of a
test's time, and its arrays are small. The programs that tests start inherit both.
"""

import importlib.util
import os

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# LLVM's passes only: those of XLA, whose results tests read, all run.
QUICK = importlib.util.find_spec("jax_cuda13_plugin") is None
if QUICK:
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def _as_users_compile(request):
    """For modules marked `optimized`: without LLVM's passes a product and a sum are not fused, and
    a test of single bits would not see what that changes.
    """
    if not QUICK or request.node.get_closest_marker("optimized") is None:
        yield
        return
    _compile_quickly(False)
    yield
    _compile_quickly(True)


def _compile_quickly(quick: bool) -> None:
    jax.config.update("jax_disable_most_optimizations", quick)
    jax.clear_caches()  # of what was compiled the other way
