"""How the program sets up jax before its first use: device memory and compiled programs.

All of it is decided here and not by the user's environment, except that a variable which the user
did set wins. XLA's flags stay as they are; what a training step wants is an option of its program
(train/overlap.py). It knows nothing of models.
"""

import importlib.util
import os
import pathlib

import jax

# A share of the device's memory; jax's own default leaves a quarter of the card unused.
MEMORY_FRACTION = "0.97"


def configure() -> None:
    """Call before any jax operation; later calls change nothing that is already running."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_FRACTION)
    if jax.config.jax_compilation_cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        cache = pathlib.Path(base) / "qwen_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
