"""What a checkpoint says of itself: CKPT/manifest.json, written last.

Everything else about the files follows from it and the parameter table.
"""

import dataclasses
import os
import pathlib
from typing import Any

from qwen_jax.config import ModelConfig, load_hf_config
from qwen_jax.errors import InputError
from qwen_jax.files import read_json_object
from qwen_jax.quant import QuantFormat

MANIFEST_NAME = "manifest.json"
DTYPES = ("bfloat16", "float32")

_FORMAT = "qwen-jax checkpoint"
_VERSION = 2  # 1 had no checksums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint says of itself."""

    config: ModelConfig
    dtype: str  # of every array that is not quantized, one of DTYPES
    quantization: QuantFormat | None
    fingerprint: str  # identifies the weights that it was converted from
    checksums: dict[str, str]  # of each leaf, see docs/formats.md

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "config": self.config.to_dict(),
            "dtype": self.dtype,
            "quantization": dataclasses.asdict(self.quantization) if self.quantization else None,
            "fingerprint": self.fingerprint,
            "checksums": self.checksums,
        }


def load_manifest(path: str | os.PathLike) -> Manifest:
    """Reads CKPT/manifest.json; InputError if `path` is not a complete checkpoint of ours."""
    path = pathlib.Path(path)
    file = path / MANIFEST_NAME
    if not file.is_file():
        hint = "convert it first" if (path / "config.json").is_file() else "check the path"
        raise InputError(f"{path} is not a converted checkpoint (no {MANIFEST_NAME}); {hint}")
    values = read_json_object(file)
    keys = {"format", "version", "config", "dtype", "quantization", "fingerprint", "checksums"}
    if values.get("format") != _FORMAT or values.get("version") != _VERSION:
        raise InputError(
            f"{file} has format {values.get('format')!r} version {values.get('version')!r}; "
            f"expected {_FORMAT!r} version {_VERSION}: convert the model again"
        )
    fmt, config = values.get("quantization"), values.get("config")
    good_fmt = fmt is None or (isinstance(fmt, dict) and set(fmt) == {"kind", "group"})
    if set(values) != keys or values["dtype"] not in DTYPES or not isinstance(config, dict):
        raise InputError(f"{file} is damaged: expected the keys {sorted(keys)}; convert again")
    sums = values["checksums"]
    good_sums = isinstance(sums, dict) and all(isinstance(s, str) for s in sums.values())
    if not good_fmt or not good_sums or not isinstance(values["fingerprint"], str):
        raise InputError(
            f"{file} is damaged: quantization {fmt!r}, fingerprint or checksums are not what the "
            "format says; convert the model again"
        )
    return Manifest(
        config=ModelConfig.from_dict(config),
        dtype=values["dtype"],
        quantization=None if fmt is None else QuantFormat(**fmt),
        fingerprint=values["fingerprint"],
        checksums=sums,
    )


def planned_manifest(path: str | os.PathLike) -> Manifest:
    """The manifest of a checkpoint or, before any conversion, what config.json alone says: enough
    for a plan, and of no use for loading."""
    folder = pathlib.Path(path)
    if (folder / MANIFEST_NAME).exists() or not (folder / "config.json").exists():
        return load_manifest(folder)
    return Manifest(
        config=load_hf_config(folder),
        dtype="bfloat16",
        quantization=None,
        fingerprint="",
        checksums={},
    )
