"""Fine-tunes a checkpoint with LoRA or QLoRA: one program, from top to bottom.

    python -m train.lora --model_name_or_path CKPT --dataset NAME --dataset_dir DIR --output_dir OUT

    OUT/checkpoint-N/                     every so often, to resume from: see train.state
    OUT/adapter_*, OUT/trainer_log.jsonl  the finished adapter; the log

The flags are those of LLaMA-Factory. A resumed run continues bit for bit: the order of the data is
arithmetic on the step, and everything else that changes is in the state.
"""

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from qwen_jax import processes, runtime
from qwen_jax.adapters import abstract_lora, describe_trainable, init_lora, save_peft
from qwen_jax.cli import parse, run
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.manifest import load_manifest, planned_manifest
from qwen_jax.memory import mesh_limit, replicated_share
from qwen_jax.params import tree_bytes
from qwen_jax.sharding import check_tensor_axis, describe_mesh, make_mesh, parse_mesh
from qwen_jax.tokenizer import Tokenizer
from train.arguments import Args, check
from train.base import check_room_to_quantize, load_base
from train.batches import Example, batches, bucket_length, fingerprint
from train.data import load_dataset
from train.memory import REMEDY, decide
from train.packing import describe, pack
from train.plan import ModelPlan, Plan
from train.report import Report
from train.state import check_free, find_start, load_state, prepare_output, save_checkpoint
from train.step import (
    Compute,
    TrainState,
    abstract_state,
    batch_sharding,
    compile_step,
    init_state,
    make_optimizer,
    make_schedule,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Decides and says all that can be known without weights, then trains."""
    runtime.configure()
    args = parse(Args, argv)
    check(args)
    sizes = parse_mesh(args.mesh)
    if args.plan:
        print_plan(args, sizes)
        return
    with processes.joined(
        args.coordinator,
        args.num_processes,
        args.process_id,
        args.local_devices,
        devices=math.prod(sizes.values()),
    ):
        prepare(args, sizes)


# Flags that may differ from process to process.
_OWN = ("process_id", "local_devices", "model_name_or_path", "dataset_dir")


def prepare(args: Args, sizes: dict[str, int]) -> None:
    """Everything before the weights; then the run."""
    mesh = make_mesh(sizes)  # first: it may have to ask for virtual devices
    shared = {k: v for k, v in dataclasses.asdict(args).items() if k not in _OWN}
    processes.check_same("the flags", shared)
    resume_from = find_start(args)

    manifest = load_manifest(args.model_name_or_path)
    cfg = manifest.config
    check_heads(sizes, cfg)
    model = ModelPlan.make(args, manifest)
    print(describe_trainable(cfg, model.lora))
    if args.overwrite_cache:
        print("overwrite_cache: nothing to do, tokenized data is not cached")
    tokenizer = Tokenizer.from_dir(args.model_name_or_path, cfg.vocab_size)
    dataset = load_dataset(
        args.dataset,
        args.dataset_dir,
        tokenizer,
        cutoff_len=args.cutoff_len,
        max_samples=args.max_samples,
        system=args.system,
    )
    print(f"dataset {args.dataset}: {dataset.summary()}")
    examples = pack(dataset.examples, args.cutoff_len) if args.packed else dataset.examples
    longest = max(len(example.ids) for example in examples)
    length = bucket_length(longest, args.cutoff_len)
    if args.packed:
        print(describe(examples, length))
    if args.compute == "fp8":
        print("compute fp8: faster and coarser; how it was tried stands in docs/benchmarks.md")
    plan = Plan.make(args, model, sizes, len(examples))
    print(plan.describe(mesh.devices.flat[0].device_kind))
    say_replicated(model, sizes)
    limit = mesh_limit(mesh)
    check_room_to_quantize(manifest, model.dtype, model.quantize_to, sizes, limit)
    memory = decide(args, model, sizes, length, limit)
    print(f"memory of each device at {length} tokens a row:\n{memory.describe()}")
    memory.budget.check(REMEDY)

    compute = Compute(remat=memory.remat, products=args.compute, mesh=mesh, overlap=args.overlap)
    on_host = memory.offload_embedding
    train(args, plan, examples, tokenizer.eod_id, compute, on_host, resume_from)


def check_heads(sizes: dict[str, int], cfg: ModelConfig) -> None:
    """InputError if the mesh does not fit the model."""
    check_tensor_axis(sizes, {"heads": cfg.num_heads, "FFN columns": cfg.ffn_size})


def say_replicated(model: ModelPlan, sizes: dict[str, int]) -> None:
    """Prints which weights the mesh does not divide, if any."""
    line = replicated_share(model.manifest.config, model.dtype, model.format, sizes)
    if line:
        print(line)


def print_plan(args: Args, sizes: dict[str, int]) -> None:
    """What --plan prints: from the parameter table, with no weights and on any machine."""
    manifest = planned_manifest(args.model_name_or_path)
    check_heads(sizes, manifest.config)
    model = ModelPlan.make(args, manifest)
    memory = decide(args, model, sizes, bucket_length(args.cutoff_len, args.cutoff_len), 0)
    print(describe_trainable(manifest.config, model.lora))
    say_replicated(model, sizes)
    print(f"memory of each of {math.prod(sizes.values())} devices ({describe_mesh(sizes)}), "
          f"rows of {args.cutoff_len} tokens, remat {memory.remat}:")  # fmt: skip
    print(memory.describe())
    memory.budget.check(REMEDY)


def train(
    args: Args,
    plan: Plan,
    examples: Sequence[Example],
    pad_id: int,
    compute: Compute,
    offload_embedding: bool,
    resume_from: pathlib.Path | None,
) -> None:
    """The run itself: state, base and compiled step, then step by step to the finished adapter."""
    model, cfg, mesh = plan.model, plan.model.manifest.config, compute.mesh
    schedule = make_schedule(args.lr_scheduler_type, args.learning_rate, plan.total, plan.warmup)
    optimizer = make_optimizer(
        schedule, max_grad_norm=args.max_grad_norm, weight_decay=args.weight_decay
    )
    settings = plan.settings(args) | {"data": fingerprint(examples)}
    start = resume_from.name if resume_from else None
    memory = [str(compute.remat), offload_embedding]
    processes.check_same("the settings", [settings, *memory, plan.sizes, start])
    state = start_state(plan, settings, optimizer, mesh, resume_from)
    folder = prepare_output(args, resume_from)
    processes.by_first("finding room", lambda: check_free(folder, state))
    params = load_base(args.model_name_or_path, model.dtype, model.quantize_to, mesh)
    table = processes.fetch(params.pop("wte")) if offload_embedding else None
    print(f"base {tree_bytes(params) / 1e9:.2f} GB over {mesh.size} devices", flush=True)
    save_adapter = functools.partial(
        save_peft,
        cfg=cfg,
        lora_cfg=model.lora,
        base_name=args.model_name_or_path,
        fingerprint=model.manifest.fingerprint,
    )
    step_fn = compile_step(cfg, optimizer, schedule, state, params, compute)

    first = int(state.step)
    report = Report(
        folder,
        start=first,
        total=plan.total,
        steps_per_epoch=plan.batches.steps_per_epoch,
        every=args.logging_steps,
    )
    stop = processes.Agreed()  # the signal that any of the processes got
    before = metrics = None  # of the last two steps
    with contextlib.closing(report), interruptible() as interrupted:
        for step, batch in batches(
            examples,
            plan.batches,
            first,
            plan.total,
            cutoff_len=args.cutoff_len,
            pad_id=pad_id,
            packed=args.packed,
        ):
            if table is not None:
                # Looked up while the last step runs, but not before the one before it has ended:
                # these rows take memory from now on, 67 MB for 4,096 tokens of 72B.
                jax.block_until_ready(before)
            rows = micro_batches(batch, plan.accumulation, mesh, table)
            before = metrics
            state, metrics = step_fn(state, params, rows)
            done = step + 1
            report.add(done, metrics, int(batch["lengths"].sum()))
            number = stop.update(interrupted[0] if interrupted else 0)
            if number or save_due(args, plan, done):
                report.check()
                with going_on(report, unless=bool(number)):
                    save_checkpoint(folder, state, settings, save_adapter)
            if number and done < plan.total:
                print(f"stopped after step {done}; to go on from {folder}/checkpoint-{done}, run "
                      "the same command without --overwrite_output_dir")  # fmt: skip
                processes.part()
                raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(143)

    save_adapter(folder, lora=state.lora)
    print(f"adapter saved in {folder}")


def start_state(
    plan: Plan,
    settings: dict[str, Any],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    resume_from: pathlib.Path | None,
) -> TrainState:
    """That of step 0, or that of the checkpoint to go on from."""
    cfg, lora_cfg = plan.model.manifest.config, plan.model.lora
    if resume_from is None:
        key = jax.random.key(plan.batches.seed)
        return init_state(optimizer, init_lora(cfg, lora_cfg, key, mesh), mesh)
    abstract = abstract_state(optimizer, abstract_lora(cfg, lora_cfg, mesh=mesh), mesh)
    state = load_state(resume_from, abstract, settings)
    print(f"resuming from {resume_from}")
    return state


def micro_batches(
    batch: dict[str, np.ndarray],  # tokens, loss_mask, perhaps segments [A * B, T]
    accumulation: int,  # A
    mesh: Mesh,
    table: np.ndarray | None = None,  # [V, D]: an embedding that stays on the host
) -> dict[str, jax.Array]:  # [A, B, T], and embedded [A, B, T, D] with a table
    """The rows of a step, cut into its micro batches and laid out over the devices.

    Each process places, and looks up, only the rows of its own devices.
    """
    layout = batch_sharding(mesh)
    cut = {
        name: batch[name].reshape(accumulation, -1, batch[name].shape[-1])
        for name in ("tokens", "loss_mask", "segments")
        if name in batch
    }

    def placed(shape: tuple[int, ...], part) -> jax.Array:
        return jax.make_array_from_callback(shape, layout, part)

    rows = {name: placed(x.shape, x.__getitem__) for name, x in cut.items()}
    if table is not None:
        tokens = cut["tokens"]
        shape = (*tokens.shape, table.shape[-1])
        rows["embedded"] = placed(shape, lambda index: table[tokens[index[:3]]])
    return rows


def save_due(args: Args, plan: Plan, done: int) -> bool:
    """Whether --save_strategy wants a checkpoint after `done` steps."""
    if args.save_strategy == "epoch":
        return done % plan.batches.steps_per_epoch == 0 or done == plan.total
    return args.save_strategy == "steps" and done % args.save_steps == 0


@contextlib.contextmanager
def going_on(report: Report, unless: bool) -> Iterator[None]:
    """A checkpoint that cannot be written, say on a full disk, is no reason to lose the run.

    Unless it fails in one of several processes: then the others cannot know.
    """
    try:
        yield
    except InputError as error:
        if unless or isinstance(error, processes.Alone):
            raise
        report.say(f"warning: not saved, training goes on: {error}")


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Yields a list that gets the number of the first SIGINT or SIGTERM; the second ends it now."""
    seen: list[int] = []
    before: dict[int, Any] = {}

    def on_signal(number, frame):
        seen.append(number)
        for caught, handler in before.items():
            signal.signal(caught, handler)
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"stopping after this step (again: at once, without saving)\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, on_signal)
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    run(main)
