"""What the layers of a training step keep for the backward pass, and what they compute again.

    level       kept for each layer, besides its input            bytes a token, bf16, 72B
    full        nothing                                             0
    attention   the attention output and its softmax statistics    16,640
    selective   the outputs of all GEMMs but the last as well       180,480
    none        everything that the backward pass reads

Layers may differ: `full:36,selective:44` spends whatever memory is left where it saves time. A
named output that is kept saves the GEMM that made it; every one of them costs the same bytes for
the same saved work, so what counts is only how many fit. This file knows names, not the layers.
"""

import dataclasses

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError, did_you_mean

LEVELS = ("full", "attention", "selective", "none")

# Names of what a layer computes.
ATTENTION = "attention"  # with its softmax statistics
QKV, OUT, UP, GATE, DOWN = "qkv", "out", "up", "gate", "down"  # results of its products
LOW = "low"  # LoRA's narrow products, under a thousandth of the rest
SAVED: dict[str, tuple[str, ...]] = {
    "full": (),
    "attention": (ATTENTION,),
    "selective": (ATTENTION, QKV, OUT, UP, GATE, LOW),
}


@dataclasses.dataclass(frozen=True)
class Remat:
    """A level for each run of layers, first to last."""

    runs: tuple[tuple[int, str], ...]  # (number of layers, level)

    @classmethod
    def parse(cls, text: str, num_layers: int) -> "Remat":
        """`selective`, or `full:36,selective:44`; InputError if it does not fit the layers."""
        if text in LEVELS:
            return cls(((num_layers, text),))
        runs = []
        for part in text.split(","):
            level, _, count = part.strip().partition(":")
            if level not in LEVELS:
                raise InputError(
                    f"--remat {text!r}: unknown level {level!r}{did_you_mean(level, LEVELS)}; "
                    f"expected one of {', '.join(LEVELS)}, or layers such as full:36,selective:44"
                )
            if not count.isascii() or not count.isdigit() or int(count) < 1:
                raise InputError(f"--remat {text!r}: {part!r} needs a number of layers over 0")
            runs.append((int(count), level))
        total = sum(count for count, _ in runs)
        if total != num_layers:
            raise InputError(f"--remat {text!r} names {total} layers; the model has {num_layers}")
        return cls(tuple(runs))

    def __str__(self) -> str:
        if len(self.runs) == 1:
            return self.runs[0][1]
        return ",".join(f"{level}:{count}" for count, level in self.runs)

    @property
    def lean(self) -> bool:
        """Whether memory is all that counts: then not even a layer's weights are held in bf16."""
        return all(level == "full" for _, level in self.runs)

    def ranges(self) -> list[tuple[int, int, str]]:
        """(first layer, layer after the last, level) of each run."""
        out, start = [], 0
        for count, level in self.runs:
            out.append((start, start + count, level))
            start += count
        return out


def saved_values(cfg: ModelConfig, level: str, tensor: int = 1) -> int:
    """How many activation values a layer of `level` keeps for a token, besides its input, on each
    of `tensor` devices over which heads and the MLP are cut.
    """
    M, D, F = cfg.attention_size, cfg.hidden_size, cfg.ffn_size
    # The narrow products of LoRA are left out: 5 ranks a token, at rank 8 80 bytes of 180,480.
    sizes = {ATTENTION: M, QKV: 3 * M, OUT: D, UP: F, GATE: F, LOW: 0}
    names = SAVED["selective" if level == "none" else level]
    # The output of attention's projection is a sum over those devices: each has all of it.
    return sum(sizes[name] // (1 if name == OUT else tensor) for name in names)
