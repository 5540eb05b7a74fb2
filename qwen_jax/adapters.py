"""LoRA on the same paths as the base: make it, merge it, and read and write it as PEFT does.

    lora.weights  {"layers": {"attn": {"wqkv": {"a": [L, R, I], "b": [L, *O, R]}}, ...}}

A LoRA tree is an argument of its own beside the base tree, so that gradients, donation and
optimizer state need no filters. Orientation is torch's: a is lora_A, b is lora_B.
"""

import dataclasses
import logging
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax import processes
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError, did_you_mean, shown
from qwen_jax.files import replacing, write_json
from qwen_jax.params import ParamSpec, leaf_spec, nest, num_parameters, param_table
from qwen_jax.peft_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PeftConfig,
    PeftTensors,
    read_peft_config,
)

_log = logging.getLogger(__name__)
_FINGERPRINT_KEY = "base_fingerprint"  # in the safetensors metadata, which PEFT ignores
_PREFIX = "base_model.model."
# What other families call these layers: recipes are copied, and the nearest name would mislead.
_ELSEWHERE = {
    "q_proj": "c_attn",
    "k_proj": "c_attn",
    "v_proj": "c_attn",
    "o_proj": "attn.c_proj",
    "up_proj": "w1",
    "gate_proj": "w2",
    "down_proj": "mlp.c_proj",
}


@struct.dataclass
class Lora:
    """Low-rank pairs and the factor (alpha / rank) on their product."""

    weights: dict[str, Any]
    scale: float = struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which layers get a low-rank pair, and of what rank."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("all",)
    use_rslora: bool = False  # alpha / sqrt(rank) instead of alpha / rank

    def __post_init__(self):
        if self.rank < 1 or self.alpha <= 0:
            raise InputError(f"LoRA rank {self.rank} and alpha {self.alpha} must both be over 0")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def target_specs(cfg: ModelConfig, targets: tuple[str, ...]) -> list[ParamSpec]:
    """The rows that LoRA target names select; `all` selects every linear layer.

    Raises InputError for a name that matches nothing: PEFT drops such a name in silence, which
    has cost a published recipe two of its five targets.
    """
    by_name = {spec.lora_target: spec for spec in param_table(cfg) if spec.lora_target}
    chosen: list[ParamSpec] = []
    for target in targets:
        if target == "all":
            chosen.extend(by_name.values())
        elif target in by_name:
            chosen.append(by_name[target])
        else:
            known = [*by_name, "all"]
            hint = did_you_mean(target, known)
            if target in _ELSEWHERE:
                hint = f"; this model calls it {_ELSEWHERE[target]!r}"
            if target == "c_proj":
                hint = "; there are two: did you mean attn.c_proj, mlp.c_proj or both?"
            raise InputError(
                f"--lora_target {target!r} matches no layer of this model{hint}; known are "
                + ", ".join(known)
            )
    if not chosen:
        raise InputError("--lora_target is empty; name c_attn,attn.c_proj,w1,w2,mlp.c_proj or all")
    return [spec for spec in by_name.values() if spec in chosen]


def pair_shapes(spec: ParamSpec, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a and b for one weight, layer axis in front."""
    return (spec.layers, rank, spec.in_size), (spec.layers, *spec.out_shape, rank)


@dataclasses.dataclass(frozen=True)
class TargetCount:
    """What one target contributes: for the report that a run begins with."""

    target: str
    layers: int
    trainable: int


def count_trainable(cfg: ModelConfig, lora_cfg: LoraConfig) -> list[TargetCount]:
    """Matched layers and trainable parameters by target, from the table alone."""
    return [
        TargetCount(
            target=spec.lora_target or "",
            layers=spec.layers,
            trainable=sum(math.prod(shape) for shape in pair_shapes(spec, lora_cfg.rank)),
        )
        for spec in target_specs(cfg, lora_cfg.targets)
    ]


def describe_trainable(cfg: ModelConfig, lora_cfg: LoraConfig) -> str:
    """The report as text: a line a target, then the sum and its share of the base."""
    counts = count_trainable(cfg, lora_cfg)
    lines = [f"  {c.target:<12} {c.layers:>3} layers matched  {c.trainable:>13,}" for c in counts]
    total, base = sum(c.trainable for c in counts), num_parameters(cfg)
    lines.append(f"trainable {total:,} of {base:,} parameters ({100 * total / base:.3f} %)")
    return "\n".join(lines)


def abstract_lora(
    cfg: ModelConfig,
    lora_cfg: LoraConfig,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
) -> Lora:
    """The LoRA tree as ShapeDtypeStructs; each pair is split like the weight that it corrects."""
    leaves = {}
    for spec in target_specs(cfg, lora_cfg.targets):
        a_shape, b_shape = pair_shapes(spec, lora_cfg.rank)
        a_layout = b_layout = None
        if mesh is not None:
            layout = leaf_spec(spec, mesh, None)
            a_layout = NamedSharding(mesh, PartitionSpec(None, None, layout[-1]))
            b_layout = NamedSharding(mesh, PartitionSpec(None, *layout[:-1], None))
        leaves[spec.path] = {
            "a": jax.ShapeDtypeStruct(a_shape, dtype, sharding=a_layout),
            "b": jax.ShapeDtypeStruct(b_shape, dtype, sharding=b_layout),
        }
    return Lora(weights=nest(leaves), scale=lora_cfg.scale)


def init_lora(
    cfg: ModelConfig, lora_cfg: LoraConfig, key: jax.Array, mesh: Mesh | None = None
) -> Lora:
    """A fresh adapter as PEFT makes it: a uniform within 1/sqrt(I), b zero, both float32."""
    abstract = abstract_lora(cfg, lora_cfg, mesh=mesh)
    specs = target_specs(cfg, lora_cfg.targets)

    def build(key: jax.Array) -> Lora:
        leaves = {}
        for index, spec in enumerate(specs):
            a_shape, b_shape = pair_shapes(spec, lora_cfg.rank)
            bound = 1 / math.sqrt(spec.in_size)
            a = jax.random.uniform(jax.random.fold_in(key, index), a_shape, minval=-bound)
            leaves[spec.path] = {"a": jnp.clip(a, -bound, bound), "b": jnp.zeros(b_shape)}
        return Lora(weights=nest(leaves), scale=lora_cfg.scale)

    out = None if mesh is None else jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(build, out_shardings=out)(key)


def merged_weight(
    w: np.ndarray | jax.Array,  # [*O, I] of one layer, or some of its rows
    pair: dict[str, Any],  # a [R, I], b [*O, R] of the same layer and rows
    scale: float,
    dtype: Any = None,  # of the result; default that of w
) -> jax.Array:
    """w + scale * b a, summed in float32 and rounded once."""
    delta = jnp.einsum(
        "...r,ri->...i",
        jnp.asarray(pair["b"], jnp.float32),
        jnp.asarray(pair["a"], jnp.float32),
        precision="highest",
    )
    return (jnp.asarray(w).astype(jnp.float32) + scale * delta).astype(dtype or w.dtype)


def save_peft(
    folder: pathlib.Path,
    cfg: ModelConfig,
    lora_cfg: LoraConfig,
    lora: Lora,
    *,
    base_name: str,
    fingerprint: str,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors as PEFT reads them.

    Tensors are float32 under the official Qwen module names. The weights file goes first and each
    file appears whole, so a folder with an adapter_config.json is a complete adapter. Of several
    processes all must call it, and process 0 writes; the others do not wait for it.
    """
    tensors: dict[str, np.ndarray] = {}
    for spec in target_specs(cfg, lora_cfg.targets):
        pair = _at(lora.weights, spec.path)
        a, b = (processes.fetch(pair[side]).astype(np.float32) for side in "ab")
        for layer, name in enumerate(spec.torch_names()):
            module = _PREFIX + name.rpartition(".")[0]
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a[layer])
            tensors[f"{module}.lora_B.weight"] = b[layer].reshape(-1, lora_cfg.rank).copy()
    if not processes.first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", _FINGERPRINT_KEY: fingerprint}
    with replacing(folder / ADAPTER_WEIGHTS) as path:
        try:
            safetensors.numpy.save_file(tensors, path, metadata=metadata)
        except safetensors.SafetensorError as error:
            raise InputError(f"{folder / ADAPTER_WEIGHTS} cannot be written: {error}") from None
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora_cfg.rank,
        "lora_alpha": lora_cfg.alpha,
        "lora_dropout": 0.0,
        "target_modules": [spec.lora_target for spec in target_specs(cfg, lora_cfg.targets)],
        "use_rslora": lora_cfg.use_rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }
    write_json(folder / ADAPTER_CONFIG, config)


def load_peft(
    folder: pathlib.Path,
    cfg: ModelConfig,
    *,
    fingerprint: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[Lora, LoraConfig]:
    """Reads a PEFT LoRA adapter of this model: one of ours, or of any other trainer for Qwen v1.

    Ranks and scales that differ between modules become one: a smaller rank is filled up with
    zeros, a scale goes into b. Raises InputError for an adapter of another kind, of another base
    (by `fingerprint`, if both sides know it; an adapter without one is told of), or with tensors
    that match nothing, lack a partner or have the wrong shape.
    """
    folder = pathlib.Path(folder)
    config, tensors = read_peft_config(folder), PeftTensors(folder)
    _check_base(folder, config, tensors.metadata.get(_FINGERPRINT_KEY), fingerprint)
    specs = [
        spec
        for spec in param_table(cfg)
        if spec.lora_target and any((m, side) in tensors for m in _modules(spec) for side in "AB")
    ]
    modules = [module for spec in specs for module in _modules(spec)]
    if not modules and not tensors.left():
        raise InputError(f"{tensors.path} holds no LoRA tensors: the adapter is empty")
    rank = max((config.rank_of(module) for module in modules), default=config.rank)
    leaves = {spec.path: _take_pairs(tensors, spec, config, rank) for spec in specs}
    if left := tensors.left():
        names = ", ".join(shown(name) for name in left[:5])
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        raise InputError(
            f"{tensors.path} has tensors that match nothing in this model: {names}{more}"
        )
    growth = rank / config.rank  # the padded rank gives the same scale with an alpha grown alike
    lora_cfg = LoraConfig(
        rank=rank,
        alpha=config.alpha * (math.sqrt(growth) if config.use_rslora else growth),
        targets=tuple(spec.lora_target for spec in specs),
        use_rslora=config.use_rslora,
    )
    lora = Lora(weights=nest(leaves), scale=lora_cfg.scale)
    if mesh is None:
        return jax.tree.map(jnp.asarray, lora), lora_cfg
    layouts = jax.tree.map(lambda x: x.sharding, abstract_lora(cfg, lora_cfg, mesh=mesh))
    return jax.tree.map(jax.device_put, lora, layouts), lora_cfg


def _check_base(
    folder: pathlib.Path, config: PeftConfig, made_for: str | None, fingerprint: str | None
) -> None:
    if not fingerprint:
        return
    if not made_for:
        _log.warning(
            "the adapter in %s does not say which weights it was trained on (base %s); its shapes "
            "fit this model, whether its base does cannot be checked",
            folder,
            config.base_name,
        )
    elif made_for != fingerprint:
        raise InputError(
            f"the adapter in {folder} was made for another base ({config.base_name}, fingerprint "
            f"{shown(made_for[:12])}); this checkpoint has {fingerprint[:12]}: use the base it was "
            "trained on"
        )


def _modules(spec: ParamSpec) -> list[str]:
    return [name.rpartition(".")[0] for name in spec.torch_names()]


def _common_scale(config: PeftConfig) -> float:
    """The scale of a module that no pattern names."""
    return config.alpha / (math.sqrt(config.rank) if config.use_rslora else config.rank)


def _take_pairs(
    tensors: PeftTensors, spec: ParamSpec, config: PeftConfig, rank: int
) -> dict[str, np.ndarray]:
    """One target's pairs, stacked: a [L, R, I] and b [L, *O, R]."""
    O, I = math.prod(spec.out_shape), spec.in_size
    ranks = [config.rank_of(module) for module in _modules(spec)]
    missing = []
    for layer, (module, own) in enumerate(zip(_modules(spec), ranks, strict=True)):
        for side, shape in (("A", (own, I)), ("B", (O, own))):
            if (module, side) in tensors:
                tensors.check((module, side), shape)  # before memory is taken by the config's word
            elif config.layers is None or layer in config.layers:
                missing.append(f"{_PREFIX}{module}.lora_{side}.weight")
    if missing:
        raise InputError(
            f"{tensors.path}: the adapter lacks {len(missing)} tensors, such as {missing[0]!r}"
        )
    a = np.zeros((spec.layers, rank, I), np.float32)
    b = np.zeros((spec.layers, O, rank), np.float32)
    for layer, (module, own) in enumerate(zip(_modules(spec), ranks, strict=True)):
        if (module, "A") in tensors and (module, "B") in tensors:
            factor = np.float32(config.scale_of(module) / _common_scale(config))
            a[layer, :own] = tensors.take((module, "A"))
            b[layer, :, :own] = tensors.take((module, "B")) * factor
    return {"a": a, "b": b.reshape(spec.layers, *spec.out_shape, rank)}


def _at(tree: dict[str, Any], path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree
