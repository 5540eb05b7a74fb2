"""The flags of the training program, those of LLaMA-Factory, and what no run can have.

Values that need the checkpoint, the data or the devices to be judged are not judged here.
"""

import dataclasses
import math

from qwen_jax.errors import InputError

TEMPLATES = ("qwen", "chatml", "default")  # three names of Qwen v1's one template
KINDS = {4: ("nf4", "int4"), 8: ("int8",)}  # quantization_bit -> kinds; the first is made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """LoRA fine-tuning of a converted Qwen checkpoint."""

    model_name_or_path: str  # a checkpoint folder that convert made
    dataset: str  # names from dataset_info.json, comma-separated
    output_dir: str
    dataset_dir: str = "data"  # the folder with dataset_info.json
    mesh: str = "1"  # number of devices (fsdp), or data=2,fsdp=2,tensor=2
    stage: str = "sft"
    do_train: bool = True
    finetuning_type: str = "lora"
    lora_rank: int = 8
    lora_alpha: float | None = None  # default: twice the rank
    lora_target: str = "all"  # c_attn,attn.c_proj,w1,w2,mlp.c_proj or all
    template: str = "qwen"
    system: str | None = None  # for rows without a system text of their own
    overwrite_cache: bool = False  # accepted; there is no cache
    overwrite_output_dir: bool = False  # begin anew, dropping an earlier run in output_dir
    resume_from_checkpoint: str | None = None  # default: the newest checkpoint in output_dir
    per_device_train_batch_size: int = 1  # rows of a micro batch for each data or fsdp device
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-5
    lr_scheduler_type: str = "linear"  # linear, cosine, constant, constant_with_warmup
    warmup_ratio: float = 0.0
    warmup_steps: int = 0  # if over 0, instead of warmup_ratio
    num_train_epochs: float = 3.0
    max_steps: int = -1  # if over 0, instead of num_train_epochs
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    logging_steps: int = 10
    save_steps: int = 500
    save_strategy: str = "steps"  # steps, epoch or no
    quantization_bit: int | None = None  # 4 or 8: quantize the base in memory, if it is not
    bf16: bool = False  # compute in bfloat16; default: the dtype of the checkpoint
    fp16: bool = False
    cutoff_len: int = 2048
    max_samples: int | None = None
    seed: int = 42
    remat: str = "full"  # full, attention, selective, none, or e.g. selective:44,full:36


def check(args: Args) -> None:
    """Raises InputError for values that no run can have; before anything is loaded."""
    for flag, expected in (
        ("stage", ("sft",)),
        ("finetuning_type", ("lora",)),
        ("template", TEMPLATES),
        ("save_strategy", ("steps", "epoch", "no")),
        ("quantization_bit", (None, *KINDS)),
        ("do_train", (True,)),
    ):
        value = getattr(args, flag)
        if value not in expected:
            known = " or ".join(str(x) for x in expected if x is not None)
            raise InputError(f"--{flag} {value}: only {known} is supported")
    if args.fp16:
        raise InputError("--fp16 overflows in this model; use --bf16")
    counts = ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps")
    for flag in (*counts, "save_steps", "learning_rate", "num_train_epochs"):
        if not 0 < getattr(args, flag) < math.inf:
            raise InputError(f"--{flag} is {getattr(args, flag)}; expected a number over 0")
    for flag in ("warmup_ratio", "warmup_steps", "weight_decay", "max_grad_norm", "seed"):
        if not 0 <= getattr(args, flag) < math.inf:
            raise InputError(f"--{flag} is {getattr(args, flag)}; expected a number from 0")
    if args.warmup_ratio > 1:
        raise InputError(f"--warmup_ratio is {args.warmup_ratio}; expected 0 to 1")
