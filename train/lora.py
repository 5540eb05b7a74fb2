"""Fine-tunes a checkpoint with LoRA or QLoRA: one program, from top to bottom.

    python -m train.lora --model_name_or_path CKPT --dataset NAME --dataset_dir DIR --output_dir OUT

    OUT/checkpoint-N/state/               LoRA weights, moments and step, to resume from (Orbax)
    OUT/checkpoint-N/run.json             the settings that a resumed run must share
    OUT/checkpoint-N/adapter_*            the adapter after N steps, as PEFT writes it
    OUT/adapter_*, OUT/trainer_log.jsonl  the finished adapter; the log

The flags are those of LLaMA-Factory. A resumed run continues bit for bit: the order of the data is
arithmetic on the step, and everything else that changes is in the state.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from qwen_jax.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    LoraConfig,
    abstract_lora,
    describe_trainable,
    init_lora,
    save_peft,
    target_specs,
)
from qwen_jax.checkpoint import Manifest, load_manifest, load_params
from qwen_jax.cli import parse, run
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.files import read_json_object, sync_folder, write_json
from qwen_jax.params import abstract_params, param_table, tree_bytes
from qwen_jax.quant import QuantFormat, quantize
from qwen_jax.remat import Remat
from qwen_jax.sharding import describe_mesh, make_mesh, parse_mesh
from qwen_jax.tokenizer import Tokenizer
from train.data import BatchPlan, batches, load_dataset
from train.report import Report
from train.step import (
    TrainState,
    abstract_state,
    batch_sharding,
    compile_step,
    init_state,
    make_optimizer,
    make_schedule,
)

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


def quantized_base(
    manifest: Manifest, bits: int | None
) -> tuple[QuantFormat | None, QuantFormat | None]:
    """The format in which the base is trained on, and that in which it must be quantized first."""
    stored = manifest.quantization
    if bits is None:
        return stored, None
    if stored is None:
        fmt = QuantFormat.named(KINDS[bits][0])
        return fmt, fmt
    if stored.kind not in KINDS[bits]:
        raise InputError(
            f"--quantization_bit {bits}: the checkpoint is stored as {stored.kind} already; leave "
            "the flag out, or convert the original with --quantize " + KINDS[bits][0]
        )
    return stored, None


def quantize_params(
    cfg: ModelConfig, params: dict[str, Any], fmt: QuantFormat, mesh
) -> dict[str, Any]:
    """Replaces the linear layers in `params` by quantized ones, layer by layer, and frees them."""
    layout = jax.tree.map(lambda x: x.sharding, abstract_params(cfg, jnp.float32, fmt, mesh))
    for spec in param_table(cfg):
        if spec.format(fmt) is None:
            continue
        parent, out = params, layout
        for name in spec.path[:-1]:
            parent, out = parent[name], out[name]
        old = parent.pop(spec.path[-1])

        def stacked(w: jax.Array):  # [L, *O, I]
            return jax.lax.map(lambda one: quantize(one, fmt), w)

        new = jax.jit(stacked, out_shardings=out[spec.path[-1]])(old)
        parent[spec.path[-1]] = jax.block_until_ready(new)
        old.delete()
    return params


def plan_steps(args: Args, plan: BatchPlan) -> tuple[int, int]:
    """Optimizer steps in all, and of the warmup, as transformers' Trainer counts them."""
    total = args.max_steps
    if total <= 0:
        total = math.ceil(args.num_train_epochs * plan.steps_per_epoch)
    return total, args.warmup_steps or math.ceil(total * args.warmup_ratio)


def checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """The complete checkpoint-N folders that this program wrote, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    found = [p for p in found if (p / "run.json").is_file() and (p / "state").is_dir()]
    return sorted(found, key=lambda p: int(p.name.partition("-")[2]))


def find_start(args: Args) -> pathlib.Path | None:
    """The checkpoint to go on from, if any."""
    folder = pathlib.Path(args.output_dir)
    if args.resume_from_checkpoint:
        chosen = pathlib.Path(args.resume_from_checkpoint)
        if chosen.resolve() not in [p.resolve() for p in checkpoints(chosen.parent)]:
            raise InputError(f"--resume_from_checkpoint {chosen} is not a complete checkpoint-N")
        return chosen
    if args.overwrite_output_dir:
        return None
    if (folder / ADAPTER_CONFIG).exists():
        raise InputError(
            f"{folder} holds a finished adapter; name another --output_dir, or train anew with "
            "--overwrite_output_dir"
        )
    return next(reversed(checkpoints(folder)), None)


def prepare_output(args: Args, start: pathlib.Path | None) -> pathlib.Path:
    """Makes the output folder; a run that begins anew drops what an earlier one left in it."""
    folder = pathlib.Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {folder} cannot be made: {error.strerror}") from None
    if args.overwrite_output_dir and start is None:
        for old in checkpoints(folder):
            shutil.rmtree(old)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "trainer_log.jsonl"):
            (folder / name).unlink(missing_ok=True)
    return folder


def save_checkpoint(folder: pathlib.Path, state: TrainState, settings: dict, adapter: dict) -> None:
    """Writes folder/checkpoint-N whole or not at all: staged under a hidden name, then renamed."""
    target = folder / f"checkpoint-{int(state.step)}"
    staging = folder / f".{target.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((staging / "state").absolute(), _stored(state))
    save_peft(staging, lora=state.lora, **adapter)
    write_json(staging / "run.json", settings)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(staging, target)
    sync_folder(folder)


def load_state(checkpoint: pathlib.Path, abstract: TrainState, settings: dict) -> TrainState:
    """Reads the state onto its devices; InputError if another run wrote it."""
    saved = read_json_object(checkpoint / "run.json")
    changed = [key for key in settings if saved.get(key) != settings[key]]
    if changed:
        what = ", ".join(f"{k} {json.dumps(saved.get(k))} -> {settings[k]!r}" for k in changed)
        raise InputError(
            f"{checkpoint} belongs to another run ({what}); use its settings again, or begin anew "
            "with --overwrite_output_dir"
        )
    with ocp.StandardCheckpointer() as checkpointer:
        kept = checkpointer.restore((checkpoint / "state").absolute(), _stored(abstract))
    lora = abstract.lora.replace(weights=kept["lora"])
    return TrainState(step=kept["step"], lora=lora, opt_state=_unflat(abstract, kept["moments"]))


def _stored(state: TrainState) -> dict[str, Any]:
    # Moments as a flat dict: optax's own tuples are no part of the file format.
    moments = {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(state.opt_state))}
    return {"step": state.step, "lora": state.lora.weights, "moments": moments}


def _unflat(abstract: TrainState, moments: dict[str, jax.Array]) -> Any:
    leaves = [moments[key] for key in sorted(moments)]
    return jax.tree.unflatten(jax.tree.structure(abstract.opt_state), leaves)


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Yields a list that the first Ctrl-C makes non-empty; the second one stops at once."""
    seen: list[int] = []

    def on_signal(number, frame):
        seen.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("stopping after this step (Ctrl-C again: at once, without saving)", flush=True)

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def main(argv: list[str] | None = None) -> None:
    """Trains; the steps of it, in order. Longer than most functions: it is the program."""
    args = parse(Args, argv)
    check(args)
    sizes = parse_mesh(args.mesh)
    mesh = make_mesh(sizes)  # first: it may have to ask for virtual devices
    start_from = find_start(args)

    manifest = load_manifest(args.model_name_or_path)
    cfg = manifest.config
    fmt, quantize_to = quantized_base(manifest, args.quantization_bit)
    dtype = "bfloat16" if args.bf16 else manifest.dtype
    lora_cfg = LoraConfig(
        rank=args.lora_rank,
        alpha=2 * args.lora_rank if args.lora_alpha is None else args.lora_alpha,
        targets=tuple(name.strip() for name in args.lora_target.split(",") if name.strip()),
    )
    remat = Remat.parse(args.remat, cfg.num_layers)
    print(describe_trainable(cfg, lora_cfg))
    if args.overwrite_cache:
        print("overwrite_cache: nothing to do, tokenized data is not cached")

    tokenizer = Tokenizer.from_dir(args.model_name_or_path)
    dataset = load_dataset(
        args.dataset,
        args.dataset_dir,
        tokenizer,
        cutoff_len=args.cutoff_len,
        max_samples=args.max_samples,
        system=args.system,
    )
    print(f"dataset {args.dataset}: {dataset.summary()}")
    rows = args.per_device_train_batch_size * sizes["data"] * sizes["fsdp"]
    global_batch = rows * args.gradient_accumulation_steps
    plan = BatchPlan(len(dataset.examples), global_batch, args.seed)
    total, warmup = plan_steps(args, plan)
    schedule = make_schedule(args.lr_scheduler_type, args.learning_rate, total, warmup)
    optimizer = make_optimizer(
        schedule, max_grad_norm=args.max_grad_norm, weight_decay=args.weight_decay
    )
    print(f"mesh {describe_mesh(sizes)} on {mesh.devices.flat[0].device_kind}; base {dtype}"
          f"{f', {fmt.kind}' if fmt else ''}; {total} steps of {global_batch} rows "
          f"({rows} x {args.gradient_accumulation_steps}), {plan.steps_per_epoch} an epoch, "
          f"{warmup} of warmup")  # fmt: skip

    # What decides the numbers of a run: a checkpoint of other settings cannot be gone on with.
    settings = {
        "fingerprint": manifest.fingerprint,
        "quantization": fmt.kind if fmt else None,
        "dtype": str(dtype),
        "targets": [spec.lora_target for spec in target_specs(cfg, lora_cfg.targets)],
        "lora_rank": lora_cfg.rank,
        "lora_alpha": float(lora_cfg.alpha),
        "dataset": args.dataset,
        "examples": len(dataset.examples),
        "cutoff_len": args.cutoff_len,
        "global_batch": global_batch,
        "total_steps": total,
        "warmup_steps": warmup,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": args.lr_scheduler_type,
        "max_grad_norm": args.max_grad_norm,
        "weight_decay": args.weight_decay,
        "seed": args.seed,
    }
    adapter = dict(
        cfg=cfg,
        lora_cfg=lora_cfg,
        base_name=args.model_name_or_path,
        fingerprint=manifest.fingerprint,
    )
    if start_from is None:
        state = init_state(
            optimizer, init_lora(cfg, lora_cfg, jax.random.key(args.seed), mesh), mesh
        )
    else:
        abstract = abstract_state(optimizer, abstract_lora(cfg, lora_cfg, mesh=mesh), mesh)
        state = load_state(start_from, abstract, settings)
        print(f"resuming from {start_from}")
    folder = prepare_output(args, start_from)
    first = int(state.step)

    _, params = load_params(args.model_name_or_path, mesh, jnp.dtype(dtype))
    if quantize_to is not None:
        print(f"quantizing the base to {quantize_to.kind}")
        params = quantize_params(cfg, params, quantize_to, mesh)
    print(f"base {tree_bytes(params) / 1e9:.2f} GB over {mesh.size} devices", flush=True)

    step_fn = compile_step(cfg, optimizer, schedule, state, params, remat=remat, mesh=mesh)
    report = Report(
        folder,
        start=first,
        total=total,
        steps_per_epoch=plan.steps_per_epoch,
        every=args.logging_steps,
    )
    accumulation, layout = args.gradient_accumulation_steps, batch_sharding(mesh)
    with contextlib.closing(report), interruptible() as interrupted:
        for step, batch in batches(
            dataset.examples,
            plan,
            start=first,
            stop=total,
            cutoff_len=args.cutoff_len,
            pad_id=tokenizer.eod_id,
        ):
            micro = {
                name: jax.device_put(batch[name].reshape(accumulation, rows, -1), layout)
                for name in ("tokens", "loss_mask")
            }
            state, metrics = step_fn(state, params, micro)
            done = step + 1
            report.add(done, metrics, int(batch["lengths"].sum()))
            due = {
                "steps": done % args.save_steps == 0,
                "epoch": done % plan.steps_per_epoch == 0 or done == total,
                "no": False,
            }[args.save_strategy]
            if due or interrupted:
                save_checkpoint(folder, state, settings, adapter)
            if interrupted and done < total:
                print(f"stopped after step {done}; to go on from {folder}/checkpoint-{done}, run "
                      "the same command without --overwrite_output_dir")  # fmt: skip
                raise KeyboardInterrupt

    save_peft(folder, lora=state.lora, **adapter)
    print(f"adapter saved in {folder}")


if __name__ == "__main__":
    run(main)
