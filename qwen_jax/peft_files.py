"""adapter_config.json and adapter_model.safetensors of PEFT, whoever wrote them: read, not judged.

    base_model.model.transformer.h.3.attn.c_attn.lora_A.weight    [R, I]
    base_model.model.transformer.h.3.attn.c_attn.lora_B.weight    [O, R]

LLaMA-Factory, ms-swift and Qwen's own scripts all save through PEFT; they differ in the prefix (a
wrapped model adds `model.` or `module.`) and in whether the adapter's name stands in the key. What
would change the numbers and is not implemented is refused here; which modules a model has is not
known.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors

from qwen_jax.errors import InputError, shown
from qwen_jax.files import read_json_object

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

_FLOATS = ("BF16", "F16", "F32", "F64")
_KEY = re.compile(
    r"(?:(?:base_model|model|module)\.)*"
    r"(?P<module>transformer\.h\.\d+\.[\w.]+?)\.lora_(?P<side>[AB])(?:\.\w+)?\.weight"
)
# What each of these adds to the low-rank product, if it is on.
_NOT_IMPLEMENTED = {
    "use_dora": "a magnitude for each output (DoRA)",
    "lora_bias": "a bias on lora_B",
    "use_qalora": "pooled inputs (QA-LoRA)",
    "use_bdlora": "block-diagonal factors",
    "layer_replication": "repeated layers",
    "trainable_token_indices": "trained embedding rows",
    "target_parameters": "parameters outside of linear layers",
    "alora_invocation_tokens": "activation by certain tokens (aLoRA)",
    "arrow_config": "routing between adapters",
    "kasa_config": "singular values (KaSA)",
    "monteclora_config": "sampled factors (MonteCLoRA)",
    "velora_config": "projected activations (VeLoRA)",
    "megatron_config": "Megatron's parallel layers",
    "fan_in_fan_out": "transposed weights, which Qwen does not have",
}
# These initializations take the starting product out of the base weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """What adapter_config.json says about ranks and scales."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    layers: frozenset[int] | None  # None: every layer has its pairs
    base_name: str

    def rank_of(self, module: str) -> int:
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """The factor on B A: alpha / rank, or alpha / sqrt(rank) with rank-stabilized LoRA."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_peft_config(folder: pathlib.Path) -> PeftConfig:
    """Reads adapter_config.json; InputError for another kind of adapter or a damaged file."""
    where = folder / ADAPTER_CONFIG
    config = read_json_object(where)
    _refuse_unknown_kinds(where, config)
    layers = config.get("layers_to_transform")
    if layers is not None:
        layers = [layers] if isinstance(layers, int) else layers
        if not isinstance(layers, list) or not all(type(n) is int and n >= 0 for n in layers):
            raise InputError(f"{where}: layers_to_transform is no list of layers")
    return PeftConfig(
        rank=_rank(where, "r", config.get("r")),
        alpha=_alpha(where, "lora_alpha", config.get("lora_alpha")),
        use_rslora=_flag(where, config, "use_rslora"),
        rank_pattern=_pattern(where, config, "rank_pattern", _rank),
        alpha_pattern=_pattern(where, config, "alpha_pattern", _alpha),
        layers=None if layers is None else frozenset(layers),
        base_name=shown(config.get("base_model_name_or_path")),
    )


def _refuse_unknown_kinds(where: pathlib.Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        kind = shown(config.get("peft_type"))
        raise InputError(f"{where}: peft_type {kind}; only LORA adapters can be read")
    if modules := config.get("modules_to_save"):
        raise InputError(
            f"{where}: modules_to_save {shown(modules)}: the adapter brings whole weights of its "
            "own, and only low-rank pairs can be read; merge it with PEFT (merge_and_unload, "
            "save_pretrained) and convert the merged model"
        )
    for key, meaning in _NOT_IMPLEMENTED.items():
        if config.get(key):
            raise InputError(f"{where}: {key} is {shown(config[key])}: {meaning}; not implemented")
    if config.get("bias", "none") != "none":
        raise InputError(f"{where}: bias {shown(config['bias'])}; only 'none' can be read")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise InputError(
            f"{where}: init_lora_weights {shown(start)} changed the base weights before training, "
            "so the adapter does not fit the published ones; save it with PEFT's "
            "path_initial_model_for_weight_conversion first"
        )


def _pattern(where: pathlib.Path, config: dict[str, Any], key: str, check: Any) -> dict[str, Any]:
    values = config.get(key) or {}
    if not isinstance(values, dict):
        raise InputError(f"{where}: {key} is {shown(values)}; expected numbers by module name")
    for name in values:
        # PEFT takes regular expressions; a pattern out of a file can run for years.
        if not re.fullmatch(r"\^?[\w.]+", name, re.ASCII):
            raise InputError(
                f"{where}: {key} has {shown(name)}; only plain module names such as "
                "'attn.c_proj' are understood, write them out"
            )
    return {name: check(where, f"{key}[{shown(name)}]", value) for name, value in values.items()}


def _by_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first name that is the end of the module's, at a dot; ^ asks for all."""
    for name, value in pattern.items():
        if module == name.removeprefix("^") or f".{module}".endswith(f".{name}"):
            return value
    return default


def _rank(where: pathlib.Path, key: str, value: Any) -> int:
    if type(value) is not int or not 0 < value <= 2**13:
        raise InputError(f"{where}: {key} is {shown(value)}; expected a rank from 1 to 8192")
    return value


def _alpha(where: pathlib.Path, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < 2**31:
        raise InputError(f"{where}: {key} is {shown(value)}; expected a number over 0")
    return float(value)


def _flag(where: pathlib.Path, config: dict[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if value is not None and type(value) is not bool:
        raise InputError(f"{where}: {key} is {shown(value)}; expected true or false")
    return bool(value)


class PeftTensors:
    """The pairs of adapter_model.safetensors by module and side; nothing is read before `take`.

    `metadata` is the file's own, strings by name. Raises InputError if the file is missing, only
    there as pickle, damaged, or names a pair twice.
    """

    def __init__(self, folder: pathlib.Path):
        self.path = folder / ADAPTER_WEIGHTS
        if not self.path.is_file():
            raise InputError(_missing_weights(folder))
        self._keys: dict[tuple[str, str], str] = {}
        self.unknown: list[str] = []
        with self._readable():
            self._file = safetensors.safe_open(self.path, framework="numpy")
            self.metadata: dict[str, str] = self._file.metadata() or {}
            names = sorted(self._file.keys())
        for name in names:
            match = _KEY.fullmatch(name)
            if match is None:
                self.unknown.append(name)
                continue
            key = (match["module"], match["side"])
            if key in self._keys:
                both = f"{shown(name)} and {shown(self._keys[key])}"
                raise InputError(f"{self.path} has {both}, which are one; expected one of them")
            self._keys[key] = name

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._keys

    def check(self, key: tuple[str, str], shape: tuple[int, ...]) -> None:
        """InputError unless the matrix is of floats and has this shape."""
        name = self._keys[key]
        with self._readable():
            part = self._file.get_slice(name)
            dtype, found = part.get_dtype(), tuple(part.get_shape())
        if found != shape or dtype not in _FLOATS:
            raise InputError(
                f"{self.path}: {shown(name)} is {dtype} {found}; this model and the rank in "
                f"{ADAPTER_CONFIG} need a float {shape}"
            )

    def take(self, key: tuple[str, str]) -> np.ndarray:
        """One matrix as float32; it then no longer counts as left."""
        name = self._keys.pop(key)
        with self._readable():
            matrix = self._file.get_tensor(name).astype(np.float32)
        if not np.isfinite(matrix).all():
            raise InputError(f"{self.path}: {shown(name)} holds NaN or Inf: its training diverged")
        return matrix

    def left(self) -> list[str]:
        """Names of all tensors that were not taken."""
        return sorted([*self._keys.values(), *self.unknown])

    def _readable(self) -> "_Readable":
        return _Readable(self.path)


class _Readable:
    """Turns what the library raises for a damaged file into one line."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        known = (safetensors.SafetensorError, OSError, ValueError, TypeError, AttributeError)
        if isinstance(error, known):
            text = " ".join(str(error).split())[:200]
            raise InputError(f"{self._path} is not a readable safetensors file: {text}") from None


def _missing_weights(folder: pathlib.Path) -> str:
    pickled = sorted(p.name for p in folder.glob("adapter_model*.bin")) if folder.is_dir() else []
    if pickled:
        return (
            f"{folder} has its weights only as pickle ({pickled[0]}), which can run any code and "
            "is never read; load the adapter with PEFT where it was made and save it again with "
            "save_pretrained(..., safe_serialization=True)"
        )
    return f"{folder / ADAPTER_WEIGHTS} does not exist; an adapter folder needs it"
