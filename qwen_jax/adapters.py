"""LoRA on the same paths as the base: make it, merge it, and read and write it as PEFT does.

    lora.weights  {"layers": {"attn": {"wqkv": {"a": [L, R, I], "b": [L, *O, R]}}, ...}}

A LoRA tree is an argument of its own beside the base tree, so that gradients, donation and
optimizer state need no filters. Orientation is torch's: a is lora_A, b is lora_B.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError, did_you_mean
from qwen_jax.files import read_json_object, replacing, write_json
from qwen_jax.params import ParamSpec, leaf_spec, nest, num_parameters, param_table

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_FINGERPRINT_KEY = "base_fingerprint"  # in the safetensors metadata, which PEFT ignores
_PREFIX = "base_model.model."
# Settings of PEFT that change what an adapter does and are not implemented.
_CHANGE_THE_RESULT = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "fan_in_fan_out",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
)
_INIT_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
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
    w: np.ndarray | jax.Array,  # [*O, I] of one layer
    pair: dict[str, Any],  # a [R, I], b [*O, R] of the same layer
    scale: float,
) -> jax.Array:
    """w + scale * b a, summed in float32 and rounded once to w's dtype."""
    delta = jnp.einsum(
        "...r,ri->...i",
        jnp.asarray(pair["b"], jnp.float32),
        jnp.asarray(pair["a"], jnp.float32),
        precision="highest",
    )
    return (jnp.asarray(w).astype(jnp.float32) + scale * delta).astype(w.dtype)


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
    file appears whole, so a folder with an adapter_config.json is a complete adapter.
    """
    tensors: dict[str, np.ndarray] = {}
    for spec in target_specs(cfg, lora_cfg.targets):
        pair = _at(lora.weights, spec.path)
        a, b = np.asarray(pair["a"], np.float32), np.asarray(pair["b"], np.float32)
        for layer, name in enumerate(spec.torch_names()):
            module = _PREFIX + name.rpartition(".")[0]
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a[layer])
            tensors[f"{module}.lora_B.weight"] = b[layer].reshape(-1, lora_cfg.rank).copy()
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", _FINGERPRINT_KEY: fingerprint}
    with replacing(folder / ADAPTER_WEIGHTS) as path:
        safetensors.numpy.save_file(tensors, path, metadata=metadata)
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

    Raises InputError for an adapter of another kind, of another base (by `fingerprint`, if both
    sides know it), or with tensors that match nothing, lack a partner or have the wrong shape.
    """
    config = read_json_object(folder / ADAPTER_CONFIG)
    tensors, metadata = _read_tensors(folder / ADAPTER_WEIGHTS)
    made_for = metadata.get(_FINGERPRINT_KEY)
    if fingerprint and made_for and made_for != fingerprint:
        base = config.get("base_model_name_or_path")
        raise InputError(
            f"the adapter in {folder} was made for another base ({base}, fingerprint "
            f"{made_for[:12]}); this checkpoint has {fingerprint[:12]}: use the base it was "
            "trained on"
        )
    rank, alpha = _check_config(folder, config)
    leaves, targets = {}, []
    for spec in param_table(cfg):
        if spec.lora_target and (pair := _take_pair(folder, tensors, spec, rank)) is not None:
            leaves[spec.path] = pair
            targets.append(spec.lora_target)
    if tensors:
        names = sorted(tensors)
        raise InputError(
            f"{folder / ADAPTER_WEIGHTS} has {len(names)} tensors that match nothing in this "
            f"model, such as {names[0]!r}"
        )
    if not leaves:
        raise InputError(f"{folder / ADAPTER_WEIGHTS} holds no LoRA tensors: the adapter is empty")
    rslora = bool(config.get("use_rslora", False))
    lora_cfg = LoraConfig(rank=rank, alpha=alpha, targets=tuple(targets), use_rslora=rslora)
    lora = Lora(weights=nest(leaves), scale=lora_cfg.scale)
    if mesh is None:
        return jax.tree.map(jnp.asarray, lora), lora_cfg
    layouts = jax.tree.map(lambda x: x.sharding, abstract_lora(cfg, lora_cfg, mesh=mesh))
    return jax.tree.map(jax.device_put, lora, layouts), lora_cfg


def _at(tree: dict[str, Any], path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _read_tensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    if not path.is_file():
        hint = " (a pickle .bin is never read)" if path.with_suffix(".bin").exists() else ""
        raise InputError(f"{path} does not exist{hint}; an adapter folder needs it")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from None


def _check_config(folder: pathlib.Path, config: dict[str, Any]) -> tuple[int, float]:
    """Returns rank and alpha; refuses what would change the result and is not implemented."""
    where = folder / ADAPTER_CONFIG
    if config.get("peft_type") != "LORA":
        raise InputError(f"{where}: peft_type {config.get('peft_type')!r}; only LORA is supported")
    for key in _CHANGE_THE_RESULT:
        if config.get(key):
            raise InputError(f"{where}: {key} is {json.dumps(config[key])}; that is not supported")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_INIT_CHANGES_BASE):
        raise InputError(
            f"{where}: init_lora_weights {init!r} also changed the base weights; let PEFT convert "
            "the adapter (path_initial_model_for_weight_conversion)"
        )
    if config.get("bias", "none") != "none":
        raise InputError(f"{where}: bias {config['bias']!r}; only 'none' is supported")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InputError(f"{where}: r is {rank!r}; expected a whole number over 0")
    # The bound keeps alpha / rank far from where float32 overflows.
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < 1e9:
        raise InputError(f"{where}: lora_alpha is {alpha!r}; expected a number over 0")
    if not isinstance(config.get("use_rslora", False), bool):
        raise InputError(f"{where}: use_rslora is {config['use_rslora']!r}; expected true or false")
    return rank, float(alpha)


def _take_pair(
    folder: pathlib.Path, tensors: dict[str, np.ndarray], spec: ParamSpec, rank: int
) -> dict[str, np.ndarray] | None:
    """Removes one target's tensors from `tensors` and stacks them; None if it has none at all."""
    shapes = {"A": (rank, spec.in_size), "B": (math.prod(spec.out_shape), rank)}
    found: dict[str, list[np.ndarray]] = {"A": [], "B": []}
    missing = []
    for name in spec.torch_names():
        module = _PREFIX + name.rpartition(".")[0]
        for side, shape in shapes.items():
            tensor = tensors.pop(f"{module}.lora_{side}.weight", None)
            if tensor is None:
                # Older PEFT versions kept the adapter's name inside the key.
                tensor = tensors.pop(f"{module}.lora_{side}.default.weight", None)
            if tensor is None:
                missing.append(f"{module}.lora_{side}.weight")
                continue
            if tensor.shape != shape or tensor.dtype.kind not in "fV":
                raise InputError(
                    f"{folder}: {module}.lora_{side}.weight is {tensor.dtype} {tensor.shape}; this "
                    f"model and rank {rank} need a float {shape}"
                )
            tensor = tensor.astype(np.float32)
            if not np.isfinite(tensor).all():
                raise InputError(
                    f"{folder}: {module}.lora_{side}.weight has NaN or Inf; use an earlier "
                    "checkpoint of that training run"
                )
            found[side].append(tensor)
    if not found["A"] and not found["B"]:
        return None
    if missing:
        raise InputError(
            f"{folder}: the adapter lacks {len(missing)} tensors, such as {missing[0]!r}"
        )
    return {
        "a": np.stack(found["A"]),
        "b": np.stack(found["B"]).reshape(spec.layers, *spec.out_shape, rank),
    }
