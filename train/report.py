"""What a training run says while it runs: a progress bar, a line every so often, a log file.

It reads metrics that the step returned; it knows nothing of the model or of how they were made. Of
several processes all check the metrics, and process 0 says and writes.
"""

import contextlib
import json
import pathlib
import time

import jax
import numpy as np
from tqdm import tqdm

from qwen_jax import processes
from qwen_jax.errors import InputError

LOG_FILE = "trainer_log.jsonl"


class Report:
    """Collects the metrics of steps and writes their mean every `logging_steps`.

    Metrics stay on the device until then: fetching them each step would make it wait.
    """

    def __init__(
        self, folder: pathlib.Path, *, start: int, total: int, steps_per_epoch: int, every: int
    ):
        self.path = folder / LOG_FILE
        self.total, self.steps_per_epoch, self.every = total, steps_per_epoch, every
        self.silent = not processes.first()
        quiet = True if self.silent else None  # None: where there is no terminal
        self.bar = tqdm(total=total, initial=start, unit="step", disable=quiet)
        self.began = time.perf_counter()
        self.metrics: list[dict] = []
        self.tokens, self.step = 0, start
        if not self.silent:
            self._drop_lines_after(start)

    def add(self, step: int, metrics: dict, tokens: int) -> None:
        """`step` steps are done; `tokens` is how many real tokens the last one read."""
        self.step = step
        self.metrics.append(metrics)
        self.tokens += tokens
        self.bar.update()
        if step % self.every == 0 or step == self.total:
            self._write(step)

    def say(self, line: str) -> None:
        """A line above the progress bar."""
        if not self.silent:
            tqdm.write(line)

    def close(self) -> None:
        self.bar.close()

    def check(self) -> None:
        """InputError if loss or gradients are no numbers any more: such a state is of no use."""
        fetched = jax.device_get(self.metrics)
        if not np.isfinite([[m["loss"], m["grad_norm"]] for m in fetched]).all():
            raise InputError(
                f"loss or gradients are no longer finite numbers within the last {len(fetched)} "
                f"steps, up to step {self.step}; lower --learning_rate and begin anew, or resume "
                "from an earlier checkpoint"
            )

    def _write(self, step: int) -> None:
        self.check()
        if self.silent:
            self.metrics = []
            return
        fetched = jax.device_get(self.metrics)
        seconds = time.perf_counter() - self.began
        weights = np.array([m["tokens"] for m in fetched], np.float64)
        losses = np.array([m["loss"] for m in fetched], np.float64)
        row = {
            "step": step,
            "epoch": round(step / self.steps_per_epoch, 4),
            "loss": float(np.dot(losses, weights) / max(weights.sum(), 1)),
            "lr": float(fetched[-1]["lr"]),
            "grad_norm": float(fetched[-1]["grad_norm"]),
            "tokens_per_second": round(self.tokens / seconds, 1),
            "seconds_per_step": round(seconds / len(fetched), 3),
        }
        if peak := peak_memory():
            row["peak_memory_bytes"] = peak
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        line = (
            f"step {step}/{self.total}  epoch {row['epoch']:.2f}  loss {row['loss']:.4f}  "
            f"lr {row['lr']:.3e}  grad_norm {row['grad_norm']:.3f}  "
            f"{row['tokens_per_second']:.0f} tok/s"
        )
        self.say(line + (f"  peak {peak / 1e9:.1f} GB" if peak else ""))
        self.metrics, self.tokens, self.began = [], 0, time.perf_counter()

    def _drop_lines_after(self, start: int) -> None:
        """A resumed run writes again what came after its checkpoint."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError):  # the last line of a killed run
                if json.loads(line)["step"] <= start:
                    kept.append(line + "\n")
        self.path.write_text("".join(kept), encoding="utf-8")


def peak_memory() -> int:
    """Most bytes that a device of this process has held; 0 where the backend does not say (CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(s.get("peak_bytes_in_use", 0) for s in stats)
