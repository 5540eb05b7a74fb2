"""What the tests of interrupted conversions share: a source, its whole result, an interruption."""

import errno
import hashlib
import pathlib
from unittest import mock

from convert.hf_files import HfWeights
from demo.tiny_checkpoint import write_tiny_checkpoint
from qwen_jax.quant import QuantFormat

NF4 = QuantFormat.named("nf4")
SIZES = dict(hidden_size=256, kv_channels=64, ffn=512, vocab_size=216, num_layers=12)


def write_source(folder: pathlib.Path, seed: int = 0) -> pathlib.Path:
    return write_tiny_checkpoint(folder, seed=seed, tokenizer=False, **SIZES)


def contents(folder: pathlib.Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_finished(output: pathlib.Path, whole: dict[str, str]) -> None:
    assert contents(output) == whole
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def interrupt_after(count: int, error: type[BaseException]):
    """A patch under which the read number `count` fails."""
    original, calls = HfWeights.read, iter(range(10**9))

    def read(self, name, rows=None, out=None):
        if out is not None and next(calls) == count:
            raise error(errno.EIO, f"{name}: bad sector")
        return original(self, name, rows, out)

    return mock.patch.object(HfWeights, "read", read)
