"""The flags of the training program, those of LLaMA-Factory, and what no run can have.

Values that need the checkpoint, the data or the devices to be judged are not judged here.
"""

import dataclasses
import math

from qwen_jax.errors import UsageError, did_you_mean
from qwen_jax.kernels.qmatmul import COMPUTE
from train.overlap import OVERLAP
from train.step import SCHEDULES

KINDS = {4: ("nf4", "int4"), 8: ("int8",)}  # quantization_bit -> kinds; the first is made

_CHOICES = {
    "stage": ("sft",),
    "finetuning_type": ("lora",),
    "template": ("qwen", "chatml", "default"),  # three names of Qwen v1's one template
    "lr_scheduler_type": SCHEDULES,
    "save_strategy": ("steps", "epoch", "no"),
    "compute": COMPUTE,
    "overlap": OVERLAP,
    "quantization_bit": (None, *KINDS),
    "do_train": (True,),
}
_COUNTS = (
    "lora_rank",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "save_steps",
    "cutoff_len",
    "max_samples",
    "num_processes",
)
_POSITIVE = ("lora_alpha", "learning_rate", "num_train_epochs", "device_memory")
_NOT_NEGATIVE = (
    "warmup_ratio",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "process_id",
)
# int32 steps, and seeds of 32 bits: jax.random.key drops the rest.
_MOST = {
    "lora_rank": 2**16,
    "per_device_train_batch_size": 2**16,
    "gradient_accumulation_steps": 2**16,
    "num_train_epochs": 10**6,
    "warmup_ratio": 1,
    "seed": 2**32 - 1,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """LoRA fine-tuning of a converted Qwen checkpoint.

    A step trains per_device_train_batch_size x gradient_accumulation_steps rows for each device of
    the data and fsdp axes.
    """

    model_name_or_path: str
    """base: a checkpoint folder that convert made"""
    dataset: str
    """names from dataset_info.json, comma-separated"""
    dataset_dir: str = "data"
    """folder with dataset_info.json"""
    output_dir: str
    """folder for checkpoints, log and the finished adapter"""
    overwrite_output_dir: bool = False
    """begin anew, dropping an earlier run in output_dir"""
    resume_from_checkpoint: str | None = None
    """folder OUT/checkpoint-N; unset: the newest one in output_dir, if any"""
    mesh: str = "1"
    """number of devices (fsdp), or sizes such as data=2,fsdp=2,tensor=2"""
    coordinator: str | None = None
    """several processes: HOST:PORT of process 0, or auto under SLURM or Open MPI; unset: one"""
    num_processes: int | None = None
    """of the run; with --coordinator HOST:PORT"""
    process_id: int | None = None
    """which of them this is, from 0; with --coordinator HOST:PORT"""
    local_devices: str | None = None
    """GPUs of this process, such as 0 or 0,1; unset: all it sees, under SLURM or Open MPI one"""

    lora_rank: int = 8
    """rank of every pair of matrices"""
    lora_alpha: float | None = None
    """the correction is scaled by alpha / rank; unset: twice the rank"""
    lora_target: str = "all"
    """layers: of c_attn,attn.c_proj,w1,w2,mlp.c_proj, comma-separated, or all"""
    quantization_bit: int | None = None
    """4 (nf4) or 8 (int8): quantize the base in memory; unset: as it is stored"""
    bf16: bool = False
    """compute in bfloat16; otherwise in the dtype of the checkpoint"""
    fp16: bool = False
    """refused: it overflows in this model"""
    compute: str = "bf16"
    """products with frozen weights: bf16 (the dtype of the activations), or fp8 (e4m3, faster and
    coarser; Hopper and later)"""
    remat: str = "auto"
    """recomputed in the backward pass: full (least memory), attention, selective, none, by layers
    such as full:36,selective:44, or auto (the fastest that fits)"""
    overlap: str = "auto"
    """of exchange between GPUs and computation, or on one of kernels with each other: none (least
    memory), schedule, pipeline, or auto"""
    offload_embedding: bool = False
    """keep the embedding table in host memory and look rows up there: 2.5 GB less for 72B; unset:
    only if --remat auto gains by it"""
    device_memory: float | None = None
    """GB of each device to plan for; unset: what this machine's devices have"""
    plan: bool = False
    """print the memory that the run would need, and stop; needs no weights, only config.json"""

    cutoff_len: int = 2048
    """tokens after which an example is cut"""
    packing: bool = False
    """fill rows of cutoff_len tokens with short examples, each of which sees only itself"""
    neat_packing: bool = False
    """the same as packing"""
    max_samples: int | None = None
    """rows read of each dataset; unset: all"""
    template: str = "qwen"
    """qwen, chatml or default: three names of Qwen's chat format"""
    system: str | None = None
    """system message of rows without one; unset: You are a helpful assistant."""
    overwrite_cache: bool = False
    """accepted; tokenized data is not cached"""

    num_train_epochs: float = 3.0
    """passes over the data"""
    max_steps: int = -1
    """optimizer steps; if over 0, instead of num_train_epochs"""
    per_device_train_batch_size: int = 1
    """rows of a micro batch for each data or fsdp device"""
    gradient_accumulation_steps: int = 1
    """micro batches of a step"""
    learning_rate: float = 5e-5
    """its peak"""
    lr_scheduler_type: str = "linear"
    """linear, cosine, constant or constant_with_warmup"""
    warmup_ratio: float = 0.0
    """share of the steps in which the learning rate rises, 0 to 1"""
    warmup_steps: int = 0
    """steps in which it rises; if over 0, instead of warmup_ratio"""
    weight_decay: float = 0.0
    """of AdamW"""
    max_grad_norm: float = 1.0
    """norm to which gradients are clipped; 0: never"""
    seed: int = 42
    """of the fresh adapter and the order of the rows"""

    logging_steps: int = 10
    """steps between two lines of the log"""
    save_strategy: str = "steps"
    """checkpoints: steps, epoch or no"""
    save_steps: int = 500
    """steps between two checkpoints"""
    stage: str = "sft"
    """only sft"""
    do_train: bool = True
    """accepted; training is all that this program does"""
    finetuning_type: str = "lora"
    """only lora"""

    @property
    def packed(self) -> bool:
        return self.packing or self.neat_packing


def check(args: Args) -> None:
    """Raises UsageError for values that no run can have; before anything is loaded."""
    for flag in ("model_name_or_path", "dataset", "dataset_dir", "output_dir", "lora_target"):
        if not getattr(args, flag).strip():
            raise UsageError(f"--{flag} is empty")
    for flag, expected in _CHOICES.items():
        value = getattr(args, flag)
        if value not in expected:
            known = [str(choice) for choice in expected if choice is not None]
            raise UsageError(
                f"--{flag} {value}: only {' or '.join(known)} is supported"
                f"{did_you_mean(str(value), known)}"
            )
    if args.fp16:
        raise UsageError("--fp16 overflows in this model; use --bf16")
    for flags, least in ((_COUNTS, "1 or more"), (_POSITIVE, "over 0"), (_NOT_NEGATIVE, "from 0")):
        for flag in flags:
            value, most = getattr(args, flag), _MOST.get(flag, math.inf)
            if value is None:
                continue
            if not 0 <= value < math.inf or (least != "from 0" and value == 0):
                raise UsageError(f"--{flag} is {value}; expected a number {least}")
            if value > most:
                raise UsageError(f"--{flag} is {value}; expected at most {most}")
    if args.max_steps >= 2**31:
        raise UsageError(f"--max_steps is {args.max_steps}; expected less than 2**31")
    if args.lr_scheduler_type == "constant" and (args.warmup_steps or args.warmup_ratio):
        raise UsageError("--lr_scheduler_type constant has no warmup; use constant_with_warmup")
