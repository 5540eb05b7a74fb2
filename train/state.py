"""Checkpoints of a run in its output folder, to resume from: found, written whole, read back.

    OUT/checkpoint-N/state/       LoRA weights, moments and step (Orbax)
    OUT/checkpoint-N/run.json     the settings that a resumed run must share; a sha256 of each file
    OUT/checkpoint-N/adapter_*    the adapter after N steps, as PEFT writes it

Of several processes each writes and reads its own slices of the state, in one folder that all of
them see; process 0 does the rest. It knows nothing of how the state is made or used.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from qwen_jax import processes
from qwen_jax.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qwen_jax.errors import InputError
from qwen_jax.files import read_json_object, sync_folder, write_json
from train.arguments import Args
from train.report import LOG_FILE
from train.step import TrainState

_CHECKSUMS = "sha256"  # in run.json


def checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """The complete checkpoint-N folders that this program wrote, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    found = [p for p in found if (p / "run.json").is_file() and (p / "state").is_dir()]
    return sorted(found, key=lambda p: int(p.name.partition("-")[2]))


def find_start(args: Args) -> pathlib.Path | None:
    """The checkpoint to go on from, if any."""
    folder = pathlib.Path(args.output_dir)
    _check_writable(folder)
    if args.resume_from_checkpoint:
        chosen = pathlib.Path(args.resume_from_checkpoint)
        if chosen.resolve() not in [p.resolve() for p in checkpoints(chosen.parent)]:
            raise InputError(
                f"--resume_from_checkpoint {chosen} is not a complete checkpoint: expected a "
                "folder such as OUT/checkpoint-500"
            )
        return chosen
    if args.overwrite_output_dir:
        return None
    if (folder / ADAPTER_CONFIG).exists():
        raise InputError(
            f"{folder} holds a finished adapter; name another --output_dir, or train anew with "
            "--overwrite_output_dir"
        )
    return next(reversed(checkpoints(folder)), None)


def _check_writable(folder: pathlib.Path) -> None:
    """Found out now and not after the data is read: nothing is made yet."""
    above = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not above.is_dir():
        raise InputError(f"--output_dir {folder}: {above} is not a folder; name another")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {folder}: {above} may not be written; name another")


def prepare_output(args: Args, start: pathlib.Path | None) -> pathlib.Path:
    """Makes the output folder; a run that begins anew drops what an earlier one left in it."""
    folder = pathlib.Path(args.output_dir)
    processes.by_first("making --output_dir", lambda: _prepare(folder, args, start))
    missing = InputError(
        f"--output_dir {folder} is not the folder that process 0 made: several processes need one "
        "that all of them see, on a shared disk"
    )
    processes.together("finding --output_dir", None if folder.is_dir() else missing)
    return folder


def _prepare(folder: pathlib.Path, args: Args, start: pathlib.Path | None) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {folder} cannot be made: {error.strerror}") from None
    if args.overwrite_output_dir and start is None:
        for old in checkpoints(folder):
            shutil.rmtree(old)
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, LOG_FILE):
            (folder / name).unlink(missing_ok=True)


def check_free(folder: pathlib.Path, state: TrainState) -> None:
    """InputError if the disk has no room for one more checkpoint (state and adapter)."""
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves((state, state.lora))) + 10**6
    if (free := shutil.disk_usage(folder).free) < needed:
        raise InputError(
            f"{folder} has {free / 1e6:.0f} MB free, a checkpoint needs {needed / 1e6:.0f} MB; "
            "free some space"
        )


def save_checkpoint(
    folder: pathlib.Path,
    state: TrainState,
    settings: dict[str, Any],
    save_adapter: Callable[..., None],  # (folder, lora=...)
) -> None:
    """Writes folder/checkpoint-N whole or not at all: staged under a hidden name, then renamed.

    InputError if it cannot be written, say because the disk is full.
    """
    target = folder / f"checkpoint-{int(state.step)}"
    staging = folder / f".{target.name}.partial"

    def begin() -> None:
        check_free(folder, state)
        shutil.rmtree(staging, ignore_errors=True)

    def save_state() -> None:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((staging / "state").resolve(), _stored(state))

    def finish() -> None:
        save_adapter(staging, lora=state.lora)
        if processes.first():
            write_json(staging / "run.json", settings | {_CHECKSUMS: _checksums(staging / "state")})
            shutil.rmtree(target, ignore_errors=True)
            os.replace(staging, target)
            sync_folder(folder)

    processes.by_first("beginning a checkpoint", begin)
    try:
        for part in (save_state, finish):
            failure = _failure(part, target)
            if failure is not None and processes.several():
                raise processes.Alone(str(failure))  # the others wait inside the same part
            processes.together(f"writing {target.name}", failure)
    finally:
        if processes.first():
            shutil.rmtree(staging, ignore_errors=True)


def _failure(act: Callable[[], None], target: pathlib.Path) -> InputError | None:
    try:
        act()
    except InputError as error:
        return error
    except (OSError, ValueError) as error:  # tensorstore raises ValueError for a full disk
        return InputError(f"{target} cannot be written: {' '.join(str(error).split())[:300]}")
    return None


def load_state(checkpoint: pathlib.Path, abstract: TrainState, settings: dict) -> TrainState:
    """Reads the state onto its devices; InputError if another run wrote it, or if it is damaged."""
    saved = read_json_object(checkpoint / "run.json")
    changed = [key for key in settings if saved.get(key) != settings[key]]
    if changed:
        what = ", ".join(f"{k} {_shown(saved.get(k))} -> {_shown(settings[k])}" for k in changed)
        raise InputError(
            f"{checkpoint} belongs to another run ({what}); use its settings again, or begin anew "
            "with --overwrite_output_dir"
        )
    # Orbax does not notice a flipped byte here, and answers a missing one with pages.
    written, found = saved.get(_CHECKSUMS), _checksums(checkpoint / "state")
    if written != found:
        written = written if isinstance(written, dict) else {}
        wrong = sorted(n for n in {*written, *found} if written.get(n) != found.get(n))
        raise InputError(
            f"{checkpoint} is damaged: {', '.join(wrong[:3])} {'is' if len(wrong) == 1 else 'are'} "
            "not as written; remove the folder to go on from an earlier one"
        )
    with ocp.StandardCheckpointer() as checkpointer:
        kept = checkpointer.restore((checkpoint / "state").resolve(), _stored(abstract))
    lora = abstract.lora.replace(weights=kept["lora"])
    return TrainState(step=kept["step"], lora=lora, opt_state=_unflat(abstract, kept["moments"]))


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:13] + "..."  # a hash


def _checksums(folder: pathlib.Path) -> dict[str, str]:
    """Name -> sha256 of every file in the folder."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            sums[str(path.relative_to(folder))] = digest
    return sums


def _stored(state: TrainState) -> dict[str, Any]:
    # Moments as a flat dict: optax's own tuples are no part of the file format.
    moments = {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(state.opt_state))}
    return {"step": state.step, "lora": state.lora.weights, "moments": moments}


def _unflat(abstract: TrainState, moments: dict[str, jax.Array]) -> Any:
    leaves = [moments[key] for key in sorted(moments)]
    return jax.tree.unflatten(jax.tree.structure(abstract.opt_state), leaves)
