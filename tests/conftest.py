"""Eight virtual CPU devices for every test, asked for before jax starts a backend, and quick
compiles: on the CPU they are most of a test's time, and its arrays are small.
"""

import importlib.util
import os

import jax

jax.config.update("jax_num_cpu_devices", 8)
if importlib.util.find_spec("jax_cuda13_plugin") is None:
    # LLVM's passes only; XLA's own, whose results tests read, all run. Also for programs started.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)
