"""One optimizer step of LoRA: gradients over A micro batches, clipping, AdamW.

    state (lora, moments) + frozen params + batch {tokens, loss_mask [A, B, T]} -> state, metrics

The loss is the sum over all trained tokens of the step divided by their count, once, so that how
rows are cut into micro batches, or padded, changes nothing. LoRA weights, their gradients and
moments are float32. It knows nothing of files, datasets or tokenizers.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax.adapters import Lora
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError, did_you_mean
from qwen_jax.kernels.hopper import is_hopper
from qwen_jax.model import hidden_states
from qwen_jax.quant import QTensor
from qwen_jax.remat import Remat
from qwen_jax.sharding import batch_spec, replicated
from train.loss import next_token_loss
from train.overlap import compiler_options

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How a step is computed: it changes speed, memory and rounding."""

    remat: Remat
    products: str = "bf16"  # with frozen weights: in the dtype of the activations, or "fp8"
    mesh: Mesh | None = None
    overlap: str = "auto"  # of exchange between GPUs and computation: train.overlap


@struct.dataclass
class TrainState:
    """All that changes from step to step."""

    step: jax.Array  # int32 []: optimizer steps done
    lora: Lora
    opt_state: Any


def make_schedule(
    kind: str, learning_rate: float, total_steps: int, warmup_steps: int = 0
) -> optax.Schedule:
    """The learning rate of step k (from 0), as transformers' get_scheduler gives it."""
    if kind not in SCHEDULES:
        raise InputError(
            f"--lr_scheduler_type {kind!r}: expected one of {', '.join(SCHEDULES)}"
            f"{did_you_mean(kind, SCHEDULES)}"
        )
    if kind == "constant" and warmup_steps:
        raise InputError("--lr_scheduler_type constant has no warmup; use constant_with_warmup")

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        if kind == "linear":
            factor = jnp.maximum(0.0, 1.0 - done)
        elif kind == "cosine":
            factor = jnp.maximum(0.0, 0.5 * (1.0 + jnp.cos(math.pi * done)))
        else:
            factor = 1.0
        return learning_rate * jnp.where(step < warmup_steps, step / max(1, warmup_steps), factor)

    return schedule


def make_optimizer(
    schedule: optax.Schedule, *, max_grad_norm: float = 1.0, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """AdamW as transformers' Trainer sets it; a max_grad_norm of 0 clips nothing."""
    clip = optax.clip_by_global_norm(max_grad_norm) if max_grad_norm > 0 else optax.identity()
    adamw = optax.adamw(schedule, b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay)
    return optax.chain(clip, adamw)


def abstract_state(
    optimizer: optax.GradientTransformation, lora: Lora, mesh: Mesh | None = None
) -> TrainState:
    """The state as ShapeDtypeStructs; moments lie like the LoRA weights that they belong to.

    `lora` is a tree of arrays or (adapters.abstract_lora) of ShapeDtypeStructs.
    """
    shapes = jax.eval_shape(optimizer.init, lora)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    lora_shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lora)
    if mesh is None:
        return TrainState(step=step, lora=lora_shapes, opt_state=shapes)

    def placed(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    layout = jax.tree.map(lambda x: x.sharding, lora)
    everywhere = replicated(mesh)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        placed,
        shapes,
        layout,
        transform_non_params=lambda x: placed(x, everywhere),
    )
    return TrainState(
        step=placed(step, everywhere),
        lora=jax.tree.map(placed, lora_shapes, layout),
        opt_state=opt_state,
    )


def init_state(
    optimizer: optax.GradientTransformation, lora: Lora, mesh: Mesh | None = None
) -> TrainState:
    """Step 0 with zero moments, born sharded."""
    out = None
    if mesh is not None:
        out = jax.tree.map(lambda x: x.sharding, abstract_state(optimizer, lora, mesh))

    def build(lora: Lora) -> TrainState:
        return TrainState(step=jnp.zeros((), jnp.int32), lora=lora, opt_state=optimizer.init(lora))

    return jax.jit(build, out_shardings=out)(lora)


def loss_and_grads(
    cfg: ModelConfig,
    params: dict[str, Any],
    lora: Lora,
    batch: dict[
        str, jax.Array
    ],  # tokens int32, loss_mask bool [A, B, T]; perhaps segments int32, embedded [A, B, T, D]
    compute: Compute,
) -> tuple[jax.Array, Lora, jax.Array]:  # float32 [], float32 tree, int32 []
    """Mean loss over the trained tokens of all micro batches, its gradient, and their count."""

    def summed_loss(lora: Lora, rows):
        hidden = hidden_states(
            cfg,
            params,
            lora,
            rows["tokens"],
            segments=rows.get("segments"),
            embedded=rows.get("embedded"),
            remat=compute.remat,
            compute=compute.products,
            mesh=compute.mesh,
        )
        head = params["lm_head"]
        return next_token_loss(hidden, head, rows["tokens"], rows["loss_mask"], compute.mesh)

    def micro(rows):
        (loss, count), grads = jax.value_and_grad(summed_loss, has_aux=True)(lora, rows)
        return loss, count, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    def add(total, rows):
        return jax.tree.map(jnp.add, total, micro(rows)), None

    first = jax.tree.map(lambda x: x[0], batch)
    if batch["tokens"].shape[0] == 1:
        total = micro(first)  # no second copy of the gradients to add them into
    else:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro, first))
        total, _ = jax.lax.scan(add, zeros, batch)
    loss, count, grads = total
    share = 1.0 / jnp.maximum(count, 1)
    return loss * share, jax.tree.map(lambda g: g * share, grads), count


def train_step(
    cfg: ModelConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
    params: dict[str, Any],
    batch: dict[str, jax.Array],  # as loss_and_grads takes it
    compute: Compute,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Metrics: loss (of the weights before the step), grad_norm (before clipping), lr, tokens."""
    loss, grads, count = loss_and_grads(cfg, params, state.lora, batch, compute)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.lora)
        lora = optax.apply_updates(state.lora, updates)
    metrics = {
        "loss": loss,
        "grad_norm": jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads))),
        "lr": schedule(state.step),
        "tokens": count,
    }
    return TrainState(step=state.step + 1, lora=lora, opt_state=opt_state), metrics


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """[A, B, ...]: the rows of each micro batch over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(None, *batch_spec()))


def compile_step(
    cfg: ModelConfig,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
    params: dict[str, Any],
    compute: Compute,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The step as one program (state, params, batch) -> state, metrics; the old state is given up.

    Compiles once for each padded length. Layouts are pinned on both sides: left to itself XLA may
    return the state in another layout and compile the second step again.
    """

    def step(state, params, batch):
        return train_step(cfg, optimizer, schedule, state, params, batch, compute)

    state_layout, params_layout = (
        jax.tree.map(lambda x: x.sharding, tree) for tree in (state, params)
    )
    at_once = at_once_pays(params, compute.remat)
    options = compiler_options(compute.mesh, compute.overlap, at_once=at_once)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(state_layout, params_layout, None),  # a batch comes laid out
        out_shardings=(state_layout, replicated(compute.mesh)),
        compiler_options=options or None,
    )


def at_once_pays(params: dict[str, Any], remat: Remat) -> bool:
    """Whether running kernels at once (train/overlap.py) is worth its memory.

    On a Hopper card, whose product leaves room for the dequantization of the next weight; and if a
    quarter of the layers keep their products, for else it is memory that is short. (One H100, 72B:
    2 % faster with all or half of the layers, not with a tenth; docs/benchmarks.md.)
    """
    leaves = jax.tree.leaves(params["layers"], is_leaf=lambda w: isinstance(w, QTensor))
    quantized = any(isinstance(w, QTensor) for w in leaves)
    kept = sum(count for count, level in remat.runs if level in ("selective", "none"))
    return is_hopper() and quantized and 4 * kept >= sum(count for count, _ in remat.runs)
