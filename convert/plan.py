"""What a conversion will write, known before any weight is read."""

import os
import pathlib
import shutil

from qwen_jax.config import ModelConfig
from qwen_jax.memory import GB, Budget, weight_bytes
from qwen_jax.quant import QuantFormat
from qwen_jax.sharding import MESH_AXES

_REMEDY = "free some of it, name an --output on another disk, or use --quantize int4 or nf4"
# More than the 2.0 GB measured at all of 72B (docs/benchmarks.md).
HOST_BYTES = 2.5e9


def disk_budget(
    cfg: ModelConfig,
    dtype: str,
    fmt: QuantFormat | None,
    output: pathlib.Path,
) -> Budget:
    """The checkpoint by kind of weight, beside the space that its disk has."""
    items = weight_bytes(cfg, dtype, fmt, dict.fromkeys(MESH_AXES, 1))
    absolute = output.absolute()
    there = next(folder for folder in (absolute, *absolute.parents) if os.path.isdir(folder))
    limit = shutil.disk_usage(there).free
    return Budget(items, limit, f"the disk of {output}")


def print_plan(cfg: ModelConfig, dtype: str, fmt: QuantFormat | None, output: pathlib.Path) -> None:
    """Prints the plan; InputError, with its numbers, if the disk is too small."""
    budget = disk_budget(cfg, dtype, fmt, output)
    print(f"{output} as {fmt.kind if fmt else dtype}:\n{budget.describe()}")
    print(f"host memory at most {HOST_BYTES / GB:.1f} GB, whatever the size of the model")
    budget.check(_REMEDY)
