"""Runs a command and says what it cost: wall and CPU seconds, and its peak of anonymous memory.

Anonymous memory (RssAnon in /proc/PID/status, the command and all its descendants added up, read
every 20 ms) is what a run needs of the machine's RAM; pages of files come and go as there is room.
Linux only. What the command does is not known here.
"""

import contextlib
import dataclasses
import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    wall: float  # seconds
    cpu: float  # seconds, user and system, of all threads
    anonymous: int  # bytes at the peak
    output: str


def watched(command: Sequence[str]) -> Cost:
    """Runs `command`; RuntimeError with the end of its output if it fails."""
    # Not a pipe: that holds 64 kB, and a progress bar of minutes writes more.
    with tempfile.TemporaryFile("w+") as log:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        peak = 0
        status: tuple[int, int] | None = None
        while status is None or status[0] == 0:
            peak = max(peak, _anonymous(process.pid))
            time.sleep(0.02)
            *status, usage = os.wait4(process.pid, os.WNOHANG)
        wall = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status[1])
        log.seek(0)
        output = log.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {output[-2000:]}")
    return Cost(wall=wall, cpu=usage.ru_utime + usage.ru_stime, anonymous=peak, output=output)


def _anonymous(pid: int) -> int:
    total = 0
    with contextlib.suppress(OSError):  # it may end in the middle
        folder = pathlib.Path(f"/proc/{pid}")
        for line in (folder / "status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total += int(line.split()[1]) * 1024
        for children in folder.glob("task/*/children"):
            total += sum(_anonymous(int(child)) for child in children.read_text().split())
    return total
