"""Downloads an original Qwen from the Hugging Face hub or a mirror, and gives up late.

    python -m convert.download --repo_id Qwen/Qwen-72B-Chat --output HF_DIR [--endpoint URL]
    python -m convert.download --repo_id 72b-chat-int4 --output HF_DIR

Only weights as safetensors, JSON and the tokenizer are taken: nothing that could run. A file has
its name only when it is whole and its hash is the published one; the same command again goes on
where the last one stopped, and finds out quickly if nothing is missing.
"""

import concurrent.futures
import dataclasses
import json
import pathlib
import re
import shutil
import threading
import time
from collections.abc import Sequence
from typing import Any

import huggingface_hub
import tqdm

from convert.hub import RemoteFile, Repository
from qwen_jax.cli import parse, run
from qwen_jax.errors import InputError, did_you_mean
from qwen_jax.files import write_json

KNOWN = tuple(
    f"Qwen/Qwen-{size}{kind}"
    for size in ("1_8B", "7B", "14B", "72B")
    for kind in ("", "-Chat", "-Chat-Int4", "-Chat-Int8")
)
RECORD_NAME = ".download.json"
# A plain name, without a path and not hidden: the list comes from outside.
_WANTED = re.compile(r"[A-Za-z0-9_][\w.-]*\.(safetensors|json|tiktoken)", re.ASCII)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Download weights, configuration and tokenizer of an original Qwen."""

    repo_id: str
    """repository such as Qwen/Qwen-72B-Chat, or a short name such as 72b-chat-int4"""
    output: pathlib.Path
    """folder to fill; an unfinished one is gone on with"""
    endpoint: str | None = None
    """address of a mirror; default HF_ENDPOINT or the hub itself"""
    revision: str = "main"
    """branch, tag or commit"""
    workers: int = 4
    """files at a time"""
    retries: int = 10
    """attempts in a row without a new byte before a file is given up"""


def resolve_name(name: str) -> str:
    """'72b-chat' or 'qwen-72B-Chat' -> 'Qwen/Qwen-72B-Chat'; repositories of others stay as is."""
    owner, slash, rest = name.rpartition("/")
    if slash and owner.lower() != "qwen":
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII):
            raise InputError(f"--repo_id {name!r}: expected OWNER/NAME, such as {KNOWN[-3]}")
        return name
    short = {known.removeprefix("Qwen/Qwen-").lower(): known for known in KNOWN}
    key = re.sub(r"^1[.-]8b", "1_8b", rest.lower().removeprefix("qwen-"))
    if key not in short:
        hint = did_you_mean(key, short)
        for near, known in short.items():
            hint = hint.replace(repr(near), repr(known))
        raise InputError(
            f"--repo_id {name!r} is no original Qwen{hint}; known are {', '.join(KNOWN)}"
        )
    return short[key]


def download(
    repo_id: str,
    output: pathlib.Path,
    *,
    endpoint: str | None = None,
    revision: str = "main",
    workers: int = 4,
    retries: int = 10,
) -> list[str]:
    """Fills the folder `output`; returns the names of the files that were fetched.

    Raises InputError if the repository has no such model, or a file cannot be had.
    """
    begin = time.perf_counter()
    huggingface_hub.utils.logging.set_verbosity_error()  # failed attempts are told by `say`
    huggingface_hub.utils.disable_progress_bars()  # one bar over all files instead
    repository = Repository(
        repo_id, endpoint=endpoint, revision=revision, retries=retries, say=tqdm.tqdm.write
    )
    files = _wanted(repository)
    try:
        output.mkdir(parents=True, exist_ok=True)
        missing = _missing(output, files)
        _remove_strays(output, files)
    except OSError as error:
        raise InputError(f"{output} cannot be read or written: {error}") from error
    total = sum(file.size or 0 for file in files)
    if not missing:
        print(f"{output} is complete: {len(files)} files, {total / 1e6:.1f} MB, all as published")
        return []
    _check_free(output, missing)
    received = _fetch_all(repository, output, missing, total, workers)
    _write_record(output, files)
    seconds = time.perf_counter() - begin
    print(
        f"{output} is complete: {len(files)} files, {total / 1e6:.1f} MB, all as published; "
        f"{len(missing)} fetched in {seconds:.1f} s ({received / 1e6 / seconds:.1f} MB/s)"
    )
    return [file.name for file in missing]


def _wanted(repository: Repository) -> list[RemoteFile]:
    listed = repository.list_files()
    files = [file for file in listed if _WANTED.fullmatch(file.name)]
    names = [file.name for file in files]
    if "config.json" not in names or not any(n.endswith(".safetensors") for n in names):
        pickled = any(file.name.endswith((".bin", ".pt", ".pth")) for file in listed)
        hint = "; it has only pickled weights, which are never read" if pickled else ""
        raise InputError(
            f"{repository.repo_id} has no config.json with safetensors{hint}; choose another "
            "repository or revision"
        )
    if len(set(names)) != len(names):
        raise InputError(f"{repository.endpoint} lists a file of {repository.repo_id} twice")
    return [repository.complete(file) for file in files]


def _missing(output: pathlib.Path, files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """The files that are not there as published; what an earlier run has hashed is believed."""
    record, missing = _read_record(output), []
    for file in files:
        path = output / file.name
        if path.is_file() and record.get(file.name) == _mark(path, file):
            continue
        if not (path.is_file() and file.matches(path)):
            missing.append(file)
    if not missing:
        _write_record(output, files)
    return missing


def _mark(path: pathlib.Path, file: RemoteFile) -> list[Any]:
    stat = path.stat()
    return [file.digest, stat.st_size, stat.st_mtime_ns]


def _read_record(output: pathlib.Path) -> dict[str, Any]:
    try:
        record = json.loads((output / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # it only saves time
    return record if isinstance(record, dict) else {}


def _write_record(output: pathlib.Path, files: Sequence[RemoteFile]) -> None:
    record = {
        file.name: _mark(output / file.name, file)
        for file in files
        if (output / file.name).is_file()
    }
    write_json(output / RECORD_NAME, record)


def _remove_strays(output: pathlib.Path, files: Sequence[RemoteFile]) -> None:
    """Removes beginnings of files that have since been published anew."""
    current = {file.partial_name for file in files}
    for path in output.glob(".*.partial"):
        if path.name not in current:
            path.unlink()


def _check_free(output: pathlib.Path, missing: Sequence[RemoteFile]) -> None:
    needed = sum(file.size or 0 for file in missing)
    for file in missing:
        partial = output / file.partial_name
        needed -= partial.stat().st_size if partial.is_file() else 0
    if (free := shutil.disk_usage(output).free) < needed:
        raise InputError(f"{output} has {free} bytes free, {needed} are needed; free some space")


def _fetch_all(
    repository: Repository,
    output: pathlib.Path,
    missing: Sequence[RemoteFile],
    total: int,
    workers: int,
) -> int:
    """Fetches `workers` files at a time; the first failure stops the others where they are."""
    lock, received = threading.Lock(), 0
    there = total - sum(file.size or 0 for file in missing)
    with tqdm.tqdm(total=total, initial=there, unit="B", unit_scale=True, desc="fetching") as bar:

        def count(num_bytes: int) -> None:
            nonlocal received
            with lock:
                received += num_bytes
                bar.update(num_bytes)

        pool = concurrent.futures.ThreadPoolExecutor(max(workers, 1))
        jobs = [pool.submit(repository.fetch, file, output, count) for file in missing]
        try:
            for number, job in enumerate(concurrent.futures.as_completed(jobs), start=1):
                bar.set_postfix_str(f"{number} of {len(missing)} files")
                job.result()
        finally:
            repository.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    return received


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(Args, argv)
    if args.workers < 1 or args.retries < 0:
        raise InputError(f"--workers {args.workers} and --retries {args.retries}: too few")
    download(
        resolve_name(args.repo_id),
        args.output,
        endpoint=args.endpoint,
        revision=args.revision,
        workers=args.workers,
        retries=args.retries,
    )


if __name__ == "__main__":
    run(main)
