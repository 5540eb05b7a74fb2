"""Several processes that compute as one, through jax.distributed: joined, agreed, heard once.

    process 0 .. N-1, each with its own devices  ->  one list of devices, one mesh, one program

Every process runs the same program on the same arguments and holds its own part of each array. What
is said and written to files comes from process 0, which is also the one that the others meet at.
With one process all of this is nothing. It knows nothing of models, files or meshes.
"""

import contextlib
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from qwen_jax.errors import InputError, UsageError

AUTO = "auto"
# Seconds. A process that sends no sign of life for this long is dead, and ends all others.
HEARTBEAT = 60
JOIN_WITHIN = 300
_LOST = ("gloo", "connection closed", "connection reset", "nccl", "coordination", "heartbeat")


@contextlib.contextmanager
def joined(
    coordinator: str | None,  # HOST:PORT of process 0; AUTO: as SLURM or Open MPI say
    num_processes: int | None = None,
    process_id: int | None = None,
    local_devices: str | None = None,  # GPUs of this process such as 0 or 0,1; None: see below
    *,
    devices: int = 1,  # of all processes together
) -> Iterator[None]:
    """Joins this process to the others for the length of the block; call before any jax operation.

    Without a coordinator there is one process. Within the block only process 0 prints. Left to
    itself a process takes all GPUs that it sees, under SLURM and Open MPI the one of its rank; with
    no GPU it makes its share of `devices` virtual ones, or one if the share is not known yet.
    UsageError for arguments that do not fit, InputError if the others cannot be met.
    """
    if coordinator is None:
        if (num_processes, process_id, local_devices) != (None, None, None):
            raise UsageError(
                "--num_processes, --process_id and --local_devices are for several processes; they "
                "need --coordinator HOST:PORT, or --coordinator auto under SLURM or Open MPI"
            )
        yield
        return
    share = max(1, devices // (num_processes or devices))
    _initialize(coordinator, num_processes, process_id, _numbers(local_devices), share)
    try:
        with _silent(jax.process_index() > 0):
            yield
            part()
    except Exception as error:
        # The others may be waiting in a collective that this process will never enter.
        raise _lost_peer(error) or error from None


class Alone(InputError):
    """A failure of one process inside an exchange, where it cannot tell the others: it must end."""


def part() -> None:
    """The farewell: waits until all processes are here, then each is on its own again."""
    if several():
        jax.distributed.shutdown()


def leave_at_once(code: int) -> None:
    """Ends a process that failed, without the farewell that would wait for the others.

    They notice that it is gone: at the next exchange of data, or after HEARTBEAT seconds.
    """
    if several():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)


def several() -> bool:
    """Whether this process is joined to others."""
    return jax.distributed.is_initialized()


def first() -> bool:
    """Whether this is process 0: the one that prints and writes."""
    return jax.process_index() == 0


def by_first(name: str, act: Callable[[], None]) -> None:
    """Process 0 acts, the others wait for it. InputError on all of them if it fails there."""
    failure: InputError | OSError | None = None
    if first():
        try:
            act()
        except (InputError, OSError) as error:
            failure = error
    together(name, failure)


def together(name: str, failure: Exception | None) -> None:
    """Raises everywhere if any process brings a failure: its own, or a line about the other."""
    worst = most(0 if failure is None else jax.process_index() + 1)
    if failure is not None:
        raise failure
    if worst:
        raise InputError(f"{name} failed in process {worst - 1}, which says why")


def most(value: int) -> int:
    """The largest `value` (0 to 2^31 - 1) over all processes."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def check_same(name: str, value: Any) -> None:
    """InputError unless all processes bring the same (as JSON): the same flags, data, plan."""
    if jax.process_count() == 1:
        return
    text = json.dumps(value, sort_keys=True, default=str)
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.int32)
    all_digests = multihost_utils.process_allgather(digest)
    other = [i for i, one in enumerate(all_digests) if (one != all_digests[0]).any()]
    if other:
        raise InputError(
            f"{name} of process {', '.join(map(str, other))} differ from those of process 0; start "
            "all processes with the same command, data and checkpoint"
        )


def fetch(x: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array on the host of every process, wherever its parts lie. All must call it."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


class Agreed:
    """A number that any process may raise in a loop, and that all of them see in the same round.

    Exchanged beside the work of a round and read a round later, when it has long arrived: so no
    round waits for it.
    """

    def __init__(self):
        self._pending: jax.Array | None = None
        if jax.process_count() > 1:
            self._mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
            everywhere = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
            self._largest = jax.jit(lambda x: x.max(), out_shardings=everywhere)

    def update(self, value: int) -> int:
        """This round's value in, the largest of the round before out; with one process, its own."""
        if jax.process_count() == 1:
            return value
        before = 0 if self._pending is None else int(self._pending)
        each = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec("all"))
        size = (self._mesh.size,)
        values = jax.make_array_from_callback(size, each, lambda _: np.array([value], np.int32))
        self._pending = self._largest(values)
        return before


def _initialize(
    coordinator: str,
    count: int | None,
    index: int | None,
    devices: list[int] | None,
    virtual: int,  # CPU devices of this process, if it has no GPU
) -> None:
    explicit: dict[str, Any] = {}
    if coordinator != AUTO:
        host, colon, port = coordinator.rpartition(":")
        if not (host and colon and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise UsageError(f"--coordinator {coordinator!r}: expected HOST:PORT, or auto")
        if count is None or index is None:
            raise UsageError("--coordinator HOST:PORT needs --num_processes and --process_id")
        explicit = {"cluster_detection_method": "deactivate", "coordinator_address": coordinator}
    if count is not None and index is not None and not 0 <= index < count:
        raise UsageError(f"--process_id {index}: expected 0 to {count - 1}")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", virtual)
    try:
        jax.distributed.initialize(
            num_processes=count,
            process_id=index,
            local_device_ids=devices,
            initialization_timeout=JOIN_WITHIN,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
            **explicit,
        )
    except ValueError as error:
        raise InputError(
            f"--coordinator auto finds no SLURM or Open MPI around it ({error}); use --coordinator "
            "HOST:PORT with --num_processes and --process_id"
        ) from None
    except (RuntimeError, jax.errors.JaxRuntimeError) as error:
        raise InputError(
            f"the processes did not meet at {coordinator} within {JOIN_WITHIN} s "
            f"({_short(error)}); start all of them, with one address that all can reach"
        ) from None


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UsageError(f"--local_devices {text!r}: expected numbers of GPUs such as 0 or 0,1")
    return [int(part) for part in parts]


@contextlib.contextmanager
def _silent(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    logging.getLogger().setLevel(logging.WARNING)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _lost_peer(error: Exception) -> InputError | None:
    """What a collective says when another process is gone, as one line; None for anything else."""
    if isinstance(error, InputError) or not isinstance(
        error, jax.errors.JaxRuntimeError | ValueError
    ):
        return None
    text = str(error)
    if not any(word in text.lower() for word in _LOST) or "RESOURCE_EXHAUSTED" in text:
        return None
    return InputError(
        f"an exchange with the other processes failed ({_short(error)}); if one of them is gone, "
        "its own output says why. Start all of them again: they go on from the last checkpoint"
    )


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
