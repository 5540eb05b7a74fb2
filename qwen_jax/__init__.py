"""The original Qwen models on JAX: `load` a checkpoint, get a `Model`, call it.

Names are imported on first use, so that `import qwen_jax.errors` costs nothing.
"""

import importlib

_HOME = {"load": "api", "Model": "api", "SamplingParams": "sampling"}

__all__ = ["Model", "SamplingParams", "load"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
