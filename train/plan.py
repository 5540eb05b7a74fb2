"""What a run will do, known from flags, manifest and number of examples, before any weights.

    Args + Manifest -> base format, dtype, LoraConfig;  + mesh sizes, examples -> Plan

Nothing here touches a device or weights.
"""

import dataclasses
import math
from typing import Any

from qwen_jax.adapters import LoraConfig, target_specs
from qwen_jax.manifest import Manifest
from qwen_jax.quant import QuantFormat
from qwen_jax.sharding import describe_mesh
from train.arguments import Args
from train.base import quantized_base
from train.batches import BatchPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """What is trained, on what base: all of it follows from the flags and the manifest."""

    manifest: Manifest
    format: QuantFormat | None  # in which the base is trained on
    quantize_to: QuantFormat | None  # in which it must be quantized first, in memory
    dtype: str
    lora: LoraConfig

    @classmethod
    def make(cls, args: Args, manifest: Manifest) -> "ModelPlan":
        fmt, quantize_to = quantized_base(manifest, args.quantization_bit)
        return cls(
            manifest=manifest,
            format=fmt,
            quantize_to=quantize_to,
            dtype="bfloat16" if args.bf16 else manifest.dtype,
            lora=LoraConfig(
                rank=args.lora_rank,
                alpha=2 * args.lora_rank if args.lora_alpha is None else args.lora_alpha,
                targets=tuple(name.strip() for name in args.lora_target.split(",") if name.strip()),
            ),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How many steps of which rows."""

    model: ModelPlan
    sizes: dict[str, int]  # mesh axis -> devices
    rows: int  # of a micro batch, over all devices
    accumulation: int  # micro batches of a step
    batches: BatchPlan
    total: int  # optimizer steps
    warmup: int  # of them

    @classmethod
    def make(cls, args: Args, model: ModelPlan, sizes: dict[str, int], num_examples: int) -> "Plan":
        rows = args.per_device_train_batch_size * sizes["data"] * sizes["fsdp"]
        batches = BatchPlan(num_examples, rows * args.gradient_accumulation_steps, args.seed)
        total, warmup = count_steps(args, batches)
        return cls(
            model=model,
            sizes=sizes,
            rows=rows,
            accumulation=args.gradient_accumulation_steps,
            batches=batches,
            total=total,
            warmup=warmup,
        )

    def describe(self, device_kind: str) -> str:
        """One line for the log."""
        fmt, batches = self.model.format, self.batches
        return (
            f"mesh {describe_mesh(self.sizes)} on {device_kind}; base {self.model.dtype}"
            f"{f', {fmt.kind}' if fmt else ''}; {self.total} steps of {batches.global_batch} rows "
            f"({self.rows} x {self.accumulation}), {batches.steps_per_epoch} an epoch, "
            f"{self.warmup} of warmup"
        )

    def settings(self, args: Args) -> dict[str, Any]:
        """What decides the numbers of a run: a checkpoint of others cannot be gone on with."""
        manifest, lora, fmt = self.model.manifest, self.model.lora, self.model.format
        specs = target_specs(manifest.config, lora.targets)
        return {
            "fingerprint": manifest.fingerprint,
            "quantization": fmt.kind if fmt else None,
            "dtype": self.model.dtype,
            "compute": args.compute,
            "targets": [spec.lora_target for spec in specs],
            "lora_rank": lora.rank,
            "lora_alpha": float(lora.alpha),
            "dataset": args.dataset,
            "examples": self.batches.num_examples,
            "cutoff_len": args.cutoff_len,
            "packing": args.packed or None,  # as a checkpoint that knew nothing of it
            "global_batch": self.batches.global_batch,
            "total_steps": self.total,
            "warmup_steps": self.warmup,
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": args.lr_scheduler_type,
            "max_grad_norm": args.max_grad_norm,
            "weight_decay": args.weight_decay,
            "seed": args.seed,
        }


def count_steps(args: Args, plan: BatchPlan) -> tuple[int, int]:
    """Optimizer steps in all, and of the warmup, as transformers' Trainer counts them."""
    total = args.max_steps
    if total <= 0:
        total = math.ceil(args.num_train_epochs * plan.steps_per_epoch)
    return total, args.warmup_steps or math.ceil(total * args.warmup_ratio)
