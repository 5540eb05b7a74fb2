"""The parameter table: the one place that says which weights a Qwen model has.

    path in our tree       torch name (transformer.)   shape, the layer axis L in front if stacked
    wte                    wte.weight                  [V, D]
    layers/ln_1            h.{i}.ln_1.weight           [L, D]
    layers/attn/wqkv       h.{i}.attn.c_attn.weight    [L, 3, N, H, D]
    layers/attn/bqkv       h.{i}.attn.c_attn.bias      [L, 3, N, H]
    layers/attn/wo         h.{i}.attn.c_proj.weight    [L, D, N*H]
    layers/ln_2            h.{i}.ln_2.weight           [L, D]
    layers/mlp/up          h.{i}.mlp.w1.weight         [L, F, D]
    layers/mlp/gate        h.{i}.mlp.w2.weight         [L, F, D]
    layers/mlp/down        h.{i}.mlp.c_proj.weight     [L, D, F]
    ln_f                   ln_f.weight                 [D]
    lm_head                lm_head.weight (no prefix)  [V, D]

From the table follow the abstract tree, shardings, random initialization, conversion, export, LoRA
shapes and LoRA target names. Weights keep torch's orientation, outputs first and the input last:
a torch tensor is then a plain reshape of ours, quantization groups and packed bytes run along the
contiguous axis, and both GEMM operands are K-major, which Hopper's fp8 and 4-bit paths want.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax.config import ModelConfig
from qwen_jax.quant import QTensor, QuantFormat, quantize
from qwen_jax.sharding import partition_spec

EMBEDDING_AXES = ("vocab_in", "embed_out")  # of the table [V, D]
HEAD_AXES = ("vocab", None)  # of the output head [V, D]

Role = Literal["embedding", "head", "linear", "bias", "norm"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """One row: a distinct tensor of the model, one of L alike if `stacked`."""

    path: tuple[str, ...]
    torch_name: str  # with {layer} where stacked
    shape: tuple[int, ...]  # of one layer
    axes: tuple[str | None, ...]  # logical axes (sharding.RULES), one for each dimension
    role: Role
    layers: int = 0  # L if stacked, else 0
    lora_target: str | None = None  # the official module name that --lora_target takes
    in_blocks: int = 0  # indivisible blocks of the input, if more than elements: heads of N*H

    @property
    def stacked(self) -> bool:
        return self.layers > 0

    @property
    def full_shape(self) -> tuple[int, ...]:
        return (self.layers, *self.shape) if self.stacked else self.shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.shape[:-1]

    @property
    def in_size(self) -> int:
        return self.shape[-1]

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Shape of one torch tensor; its row-major order is ours."""
        if self.role in ("norm", "bias"):
            return (math.prod(self.shape),)
        return (math.prod(self.out_shape), self.in_size)

    @property
    def torch_module(self) -> str:
        return self.torch_name.rpartition(".")[0]

    def torch_names(self) -> list[str]:
        """Names of the torch tensors in layer order: L of them, or one."""
        if not self.stacked:
            return [self.torch_name]
        return [self.torch_name.format(layer=i) for i in range(self.layers)]

    def format(self, fmt: QuantFormat | None) -> QuantFormat | None:
        """The format this weight is stored in: only linear layers are ever quantized."""
        return fmt if self.role == "linear" else None


def param_table(cfg: ModelConfig) -> tuple[ParamSpec, ...]:
    """The eleven rows for `cfg`, in the order in which the model uses them."""
    D, F, V = cfg.hidden_size, cfg.ffn_size, cfg.vocab_size
    N, H, M = cfg.num_heads, cfg.head_dim, cfg.attention_size

    def layer(path, name, shape, axes, role="linear", **more) -> ParamSpec:
        name = "transformer.h.{layer}." + name
        path = ("layers", *path.split("/"))
        return ParamSpec(
            path=path, torch_name=name, shape=shape, axes=axes, role=role, layers=cfg.num_layers,
            **more,
        )  # fmt: skip

    return (
        ParamSpec(
            path=("wte",), torch_name="transformer.wte.weight", shape=(V, D),
            axes=EMBEDDING_AXES, role="embedding",
        ),
        layer("ln_1", "ln_1.weight", (D,), (None,), "norm"),
        layer("attn/wqkv", "attn.c_attn.weight", (3, N, H, D), (None, "heads", "head_dim", None),
              lora_target="c_attn"),
        layer("attn/bqkv", "attn.c_attn.bias", (3, N, H), (None, "heads", None), "bias"),
        layer("attn/wo", "attn.c_proj.weight", (D, M), ("embed_out", "heads"),
              lora_target="attn.c_proj", in_blocks=N),
        layer("ln_2", "ln_2.weight", (D,), (None,), "norm"),
        layer("mlp/up", "mlp.w1.weight", (F, D), ("ffn", None), lora_target="w1"),
        layer("mlp/gate", "mlp.w2.weight", (F, D), ("ffn", None), lora_target="w2"),
        layer("mlp/down", "mlp.c_proj.weight", (D, F), ("embed_out", "ffn_in"),
              lora_target="mlp.c_proj"),
        ParamSpec(path=("ln_f",), torch_name="transformer.ln_f.weight", shape=(D,), axes=(None,),
                  role="norm"),
        ParamSpec(path=("lm_head",), torch_name="lm_head.weight", shape=(V, D),
                  axes=("vocab", None), role="head"),
    )  # fmt: skip


def num_parameters(cfg: ModelConfig) -> int:
    return sum(math.prod(spec.full_shape) for spec in param_table(cfg))


def nest(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """{("layers", "ln_1"): leaf, ...} -> {"layers": {"ln_1": leaf}, ...}."""
    return traverse_util.unflatten_dict(leaves)


def leaf_spec(
    spec: ParamSpec, mesh: Mesh, fmt: QuantFormat | None, without: tuple[str, ...] = ()
) -> PartitionSpec:
    """Layout of one layer's weight (of `data` and `scale`, if quantized), layer axis left out."""
    units = list(spec.shape)
    if spec.in_blocks:
        units[-1] = spec.in_blocks
    fmt = spec.format(fmt)
    if fmt is not None and fmt.group:
        # A device must hold whole groups, and whole heads where the input is heads.
        units[-1] = math.gcd(units[-1], fmt.groups(spec.in_size))
    return partition_spec(spec.axes, tuple(units), mesh, without)


def field_specs(
    spec: ParamSpec, mesh: Mesh, fmt: QuantFormat, without: tuple[str, ...] = ()
) -> dict[str, PartitionSpec]:
    """Layout of each array of one layer's QTensor."""
    whole = leaf_spec(spec, mesh, fmt, without)
    one_scale_a_row = fmt.group == 0
    specs = {
        "data": whole,
        "scale": PartitionSpec(*whole[:-1], None) if one_scale_a_row else whole,
    }
    if fmt.kind == "nf4":  # about 1/16,000 of the weight: every device keeps all of it
        specs |= {"scale_absmax": PartitionSpec(None), "scale_offset": PartitionSpec()}
    return specs


def abstract_params(
    cfg: ModelConfig,
    dtype: Any,
    fmt: QuantFormat | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """The tree as ShapeDtypeStructs, with shardings if a mesh is given; no array is made."""

    def struct(spec: ParamSpec, shape, dtype, layout: PartitionSpec | None):
        sharding = None
        if spec.stacked:
            shape = (spec.layers, *shape)
            layout = None if layout is None else PartitionSpec(None, *layout)
        if mesh is not None:
            sharding = NamedSharding(mesh, layout)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def leaf(spec: ParamSpec):
        leaf_fmt = spec.format(fmt)
        if leaf_fmt is None:
            layout = leaf_spec(spec, mesh, None) if mesh is not None else None
            return struct(spec, spec.shape, dtype, layout)
        layouts = field_specs(spec, mesh, leaf_fmt) if mesh is not None else {}
        return QTensor(
            kind=leaf_fmt.kind,
            **{
                name: struct(spec, shape, field_dtype, layouts.get(name))
                for name, (shape, field_dtype) in leaf_fmt.shapes(
                    spec.out_shape, spec.in_size
                ).items()
            },
        )

    return nest({spec.path: leaf(spec) for spec in param_table(cfg)})


def shardings(abstract: Any) -> Any:
    """The NamedSharding of every leaf of an abstract tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def layer_specs(
    cfg: ModelConfig, fmt: QuantFormat | None, mesh: Mesh, without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Layout of one layer's weights; without fsdp, that at the moment of use, the slices joined.

    The *packed* leaf is joined: 4-bit bytes are gathered. Left to XLA, it gathers the
    dequantized floats, four times as much.
    """

    def leaf(spec: ParamSpec):
        leaf_fmt = spec.format(fmt)
        if leaf_fmt is None:
            return leaf_spec(spec, mesh, None, without)
        return QTensor(kind=leaf_fmt.kind, **field_specs(spec, mesh, leaf_fmt, without))

    stacked = [spec for spec in param_table(cfg) if spec.stacked]
    return nest({spec.path: leaf(spec) for spec in stacked})["layers"]


def init_params(
    cfg: ModelConfig,
    key: jax.Array,
    dtype: Any,
    fmt: QuantFormat | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Random weights as the original initializes them, born sharded and, if asked, quantized.

    Linear layers and tables are normal with `initializer_range`, those that write to the residual
    stream less by sqrt(2 L); norms are one, biases zero.
    """
    abstract = abstract_params(cfg, dtype, fmt, mesh)

    def one(spec: ParamSpec, key: jax.Array) -> Any:
        if spec.role == "norm":
            return jnp.ones(spec.shape, dtype)
        if spec.role == "bias":
            return jnp.zeros(spec.shape, dtype)
        std = cfg.initializer_range
        if spec.path[-1] in ("wo", "down"):
            std /= math.sqrt(2 * cfg.num_layers)
        w = jax.random.normal(key, spec.shape, dtype) * jnp.asarray(std, dtype)
        leaf_fmt = spec.format(fmt)
        return w if leaf_fmt is None else quantize(w, leaf_fmt)

    def build(spec: ParamSpec, key: jax.Array) -> Any:
        if not spec.stacked:
            return one(spec, key)
        return jax.lax.map(lambda k: one(spec, k), jax.random.split(key, spec.layers))

    layouts = traverse_util.flatten_dict(shardings(abstract)) if mesh is not None else {}
    leaves = {}
    # One program a row, plain ones first: what it needs besides is gone before memory fills.
    table = param_table(cfg)
    for spec in sorted(table, key=lambda spec: spec.format(fmt) is not None):
        program = jax.jit(build, static_argnums=0, out_shardings=layouts.get(spec.path))
        leaves[spec.path] = program(spec, jax.random.fold_in(key, table.index(spec)))
    return nest(leaves)


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays (or ShapeDtypeStructs) of a tree."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
