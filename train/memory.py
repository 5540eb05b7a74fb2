"""The memory of a training step, computed before anything is loaded, and what it allows: which
layers keep what (remat), and whether the embedding table stays in host memory.

The sum follows what XLA keeps at the fullest moment, the backward pass of a layer: the weights, the
optimizer state, what the layers kept, and one layer's worth of work. Checked against the peak of
real runs in docs/benchmarks.md.
"""

import bisect
import dataclasses
import math
from typing import Any

import numpy as np

from qwen_jax.adapters import LoraConfig, abstract_lora
from qwen_jax.config import ModelConfig
from qwen_jax.memory import GB, Budget, abstract_mesh, device_bytes, layer_values, weight_bytes
from qwen_jax.quant import QuantFormat
from qwen_jax.remat import Remat, saved_values
from train.arguments import Args
from train.loss import CHUNK_TOKENS
from train.plan import ModelPlan

REMEDY = (
    "use --remat full, a smaller --per_device_train_batch_size or --cutoff_len, "
    "--offload_embedding, --quantization_bit 4, or more devices (--mesh fsdp=N)"
)
# Kept free for the allocator's gaps and what cuDNN and cuBLAS ask for themselves.
MARGIN = 0.015


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Everything that decides the memory of a step."""

    cfg: ModelConfig
    format: QuantFormat | None
    dtype: Any  # of activations and of plain weights
    lora: LoraConfig
    sizes: dict[str, int]  # mesh axis -> devices
    rows: int  # of a micro batch on one device
    length: int  # tokens of a row
    accumulation: int = 1
    offload_embedding: bool = False
    packed: bool = False  # rows hold several sequences each

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def item(self) -> int:
        return np.dtype(self.dtype).itemsize

    def saved_bytes(self, level: str) -> int:
        """What one layer keeps on one device."""
        cfg, item = self.cfg, self.item
        inside = saved_values(cfg, level, self.sizes["tensor"])
        statistics = 4 * cfg.num_heads // self.sizes["tensor"] if level != "full" else 0
        # Two norms compute in float32, and level none keeps what they read as they read it.
        norms = 2 * 4 * cfg.hidden_size if level == "none" else 0
        return self.tokens * ((cfg.hidden_size + inside) * item + statistics + norms)

    def budget(self, remat: Remat, limit: int = 0) -> Budget:
        """All of it, for one device."""
        cfg = self.cfg
        weights = weight_bytes(cfg, self.dtype, self.format, self.sizes)
        if self.offload_embedding:
            del weights["embedding"]
            # What is looked up for a step, and meanwhile for the next one (train/lora.py).
            rows = self.accumulation * self.tokens * cfg.hidden_size * self.item
            weights["embedded tokens of two steps"] = 2 * rows
        pairs = device_bytes(abstract_lora(cfg, self.lora, mesh=abstract_mesh(self.sizes)))
        joined = abstract_mesh(self.sizes | {"fsdp": 1})  # as the layers use and return them
        used = device_bytes(abstract_lora(cfg, self.lora, mesh=joined))
        kept, work = self._fullest(remat)
        accumulator = pairs if self.accumulation > 1 else 0
        return Budget(
            {
                **weights,
                "LoRA and its moments": 3 * pairs,
                "LoRA gradients and casts": pairs + used * self.item // 2 + accumulator,
                f"kept for the backward pass, {remat}": kept,
                "work of one layer or of the loss": work,
            },
            limit,
        )

    def _fullest(self, remat: Remat) -> tuple[int, int]:
        """What layers keep, and the work beside it, when both together are most.

        That is while the last layer of some run is differentiated: its run and those before it
        still keep what they keep; or during the loss.
        """
        moments, kept = [], 0
        for count, level in remat.runs:
            kept += count * self.saved_bytes(level)
            if level != "none":  # the result of a run's last layer lies behind the inputs of them
                kept += self.tokens * self.cfg.hidden_size * self.item
            moments.append((kept, self._layer(remat.lean or level in ("selective", "none"))))
        return max(*moments, (kept, self._loss()), key=sum)

    def _layer(self, some: bool) -> int:
        """Weights of a layer in the compute dtype, and its activations in the backward pass.

        All the weights, as a mesh may gather them at once, and a recomputed layer holds them for
        its gradients. On one device other layers, and those of a lean remat, use some: by what was
        seen on a card where kernels run at once (train/overlap.py), two large and a small one.
        """
        cfg, tensor = self.cfg, self.sizes["tensor"]
        weights = 0
        if self.format is not None or self.sizes["fsdp"] > 1:
            weights = layer_values(cfg)
            if some and math.prod(self.sizes.values()) == 1:
                large = cfg.hidden_size * max(3 * cfg.attention_size, cfg.ffn_size)
                weights = min(weights, 2 * large + cfg.hidden_size * cfg.attention_size)
            weights //= tensor
        activations = self.tokens * (4 * cfg.ffn_size + 4 * cfg.attention_size) // tensor
        mask = self.tokens * self.length if self.packed else 0  # cuDNN takes it as numbers
        return (weights + activations + 2 * self.tokens * cfg.hidden_size + mask) * self.item

    def _loss(self) -> int:
        """Logits of a chunk in float32, their gradient in the compute dtype."""
        vocabulary = self.cfg.vocab_size // self.sizes["tensor"]
        chunk = min(self.tokens, CHUNK_TOKENS)
        return chunk * vocabulary * (4 + self.item) + 3 * self.tokens * self.cfg.hidden_size * 4

    def choose_remat(self, limit: int) -> Remat:
        """The fastest that fits in `limit` bytes: as many layers as possible keep their products.

        A kept product saves D multiply-adds a value; kept attention saves about half a sequence of
        them, at half the rate of a GEMM. So long sequences keep attention first.
        """
        layers = self.cfg.num_layers
        full = Remat.parse("full", layers)
        if not limit:
            return full
        allowed = limit * (1 - MARGIN)
        fits = lambda remat: self.budget(remat).total <= allowed  # noqa: E731
        base = "attention" if 2 * self.length > self.cfg.hidden_size else "full"
        rest, level = (base, "selective") if fits(Remat.parse(base, layers)) else ("full", base)
        mixes = [_mixed(layers, rest, (level, count)) for count in range(layers + 1)]
        # The more layers keep more, the larger: the last one that fits, by halving.
        return mixes[max(0, bisect.bisect_left(mixes, True, key=lambda mix: not fits(mix)) - 1)]

    def plan(self, remat: str, limit: int) -> "MemoryPlan":
        """That of a remat as Remat.parse reads it, or `auto`, on a device of `limit` bytes.

        `auto` takes the embedding off the device if that lets layers keep more, or the run fit at
        all, and only then: each step must look its rows up on the host.
        """
        work = self
        if remat == "auto":
            chosen = self.choose_remat(limit)
            on_host = dataclasses.replace(self, offload_embedding=True)
            other = on_host.choose_remat(limit)
            fits = on_host.budget(other).total <= limit < self.budget(chosen).total
            if fits or self._kept(other) > self._kept(chosen):
                work, chosen = on_host, other
        else:
            chosen = Remat.parse(remat, self.cfg.num_layers)
        return MemoryPlan(
            remat=chosen,
            offload_embedding=work.offload_embedding,
            unasked=work is not self,
            budget=work.budget(chosen, limit),
        )

    def _kept(self, remat: Remat) -> int:
        return sum(count * self.saved_bytes(level) for count, level in remat.runs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What lies where in a run, and the memory of each device that it takes."""

    remat: Remat
    offload_embedding: bool
    unasked: bool = False  # chosen here, not by a flag
    budget: Budget

    def describe(self) -> str:
        """Lines for the log."""
        lines = self.budget.describe()
        if self.offload_embedding:
            reason = ", which makes room on the device" if self.unasked else ""
            lines += f"\nthe embedding stays in host memory{reason}"
        return lines


def workload(args: Args, model: ModelPlan, sizes: dict[str, int], length: int) -> Workload:
    """The workload of a run whose longest padded row has `length` tokens."""
    return Workload(
        cfg=model.manifest.config,
        format=model.format,
        dtype=model.dtype,
        lora=model.lora,
        sizes=sizes,
        rows=args.per_device_train_batch_size,
        length=length,
        accumulation=args.gradient_accumulation_steps,
        offload_embedding=args.offload_embedding,
        packed=args.packed,
    )


def decide(
    args: Args, model: ModelPlan, sizes: dict[str, int], length: int, limit: int
) -> MemoryPlan:
    """That of a run on a device that offers `limit` bytes (0: unknown)."""
    if args.device_memory:
        limit = int(args.device_memory * GB)
    return workload(args, model, sizes, length).plan(args.remat, limit)


def _mixed(layers: int, rest: str, last: tuple[str, int]) -> Remat:
    """The layers that keep most come last, so they are the first of the backward pass.

    While everything is still kept, only a layer with its products is differentiated; when those
    that are run again, with more work, have their turn, what the others kept is free. XLA for a CPU
    in float32: up to one layer's products less than the other way round.
    """
    level, count = last
    count = min(count, layers)
    runs = [(layers - count, rest), (count, level)]
    return Remat(tuple(run for run in runs if run[0] > 0))
