"""Files made wrong on purpose, and the watch that is kept while they are read.

mutated_json(draw, value)         a valid JSON document, changed in one to three ways, as bytes
mutated_shard(draw, header, data) the same for a safetensors file
watched(folder)                   no traceback but InputError, no file opened for writing
                                  outside of `folder`, a bound on memory
"""

import contextlib
import copy
import json
import os
import pathlib
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import strategies as st

from qwen_jax.errors import InputError

MEMORY = 3 << 30  # of address space beside what the process has: threads and arenas take some
SECONDS = 20.0
HUGE = "9" * 5000  # Python refuses to turn so many digits into a number

_written: list[str] | None = None  # files opened for writing, while a watch is on


def _audit(event: str, args: tuple) -> None:
    if _written is None:
        return
    if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
        flags = args[2] if isinstance(args[2], int) else 0
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or any(c in str(args[1]) for c in "wax+"):
            _written.append(os.fsdecode(args[0]))
    elif event in ("os.rename", "os.symlink", "os.link", "shutil.copyfile"):
        _written.append(os.fsdecode(args[1]))
    elif event in ("os.mkdir", "os.remove", "os.rmdir"):
        if args[-1] == -1:  # else the path is relative to an open folder, as rmtree has it
            _written.append(os.fsdecode(args[0]))
    elif event in ("pickle.find_class", "subprocess.Popen", "os.system"):
        _written.append(f"{event} {args!r}")


sys.addaudithook(_audit)


@contextlib.contextmanager
def watched(folder: pathlib.Path) -> Iterator[list[str]]:
    """Fails the test for anything but a clean end or an InputError of one readable line.

    Yields a list that then holds that line.
    """
    global _written
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    begin, _written = time.monotonic(), []
    refused: list[str] = []
    try:
        yield refused
    except InputError as error:
        message = str(error)
        refused.append(message)
        assert "\n" not in message and len(message) < 3000, message
        message.encode()  # prints on any terminal
    finally:
        written, _written = _written, None
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.monotonic() - begin < SECONDS
    inside = os.path.realpath(folder) + os.sep
    outside = [p for p in written if not os.path.realpath(p).startswith(inside)]
    outside = [p for p in outside if not p.startswith(("/dev/", "/proc/", "/sys/"))]
    assert not outside, outside


def nested(depth: int, kind: str) -> str:
    return "[" * depth + "]" * depth if kind == "list" else '{"a":' * depth + "1" + "}" * depth


# What stands where a value was expected; some are raw text that no Python value makes.
_RAW = [HUGE, "-" + HUGE, "1e999", "-1e999", "NaN", "1e400", nested(200_000, "list"),
        nested(100_000, "dict"), '"\\ud800"', '"\\u0000"', "01", "", "//", "tru"]  # fmt: skip
_VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 127, 128, 255, 4096, 2**31 - 1, 2**31, 2**53, 2**63 - 1,
    2**63, 2**64, 2**64 - 1, -(2**63), 10**30, 10**400, 0.0, -0.0, 1e-320, 0.5, 1.5, 1e308,
    "", "a", "0", "qwen", "gptq", "LORA", "../../etc/passwd", "/etc/passwd", "a/b.safetensors",
    "x\ny", "\x1b[31m", "\u202e", "x" * 300, "y" * 100_000, [], {}, [[]], [0], [0, 0], [-1, 4],
    [2**40, 2**40, 2**40], [1] * 1000, {"a": {}}, {"": 1}, ["a", "b"], {"dtype": "F32"},
    "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "model.safetensors", "transformer.wte.weight",
]  # fmt: skip
_MARK = "\ue000mark\ue000"  # is replaced by raw text after the document has been written


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(inner, (*path, key))


def _parent(value: Any, path: tuple) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value


def mutated_json(draw: Any, value: Any) -> bytes:
    value, raw, twice = copy.deepcopy(value), None, False
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(_places(value))))
        action = draw(st.sampled_from(["value", "value", "raw", "drop", "add", "swap", "twice"]))
        place = _parent(value, (*path, None))
        alike = [v for v in _VALUES if type(v) is type(place)]  # gets further than another type
        new = copy.deepcopy(
            draw(st.sampled_from(draw(st.sampled_from([alike, _VALUES])) or [None]))
        )
        if action == "raw":
            raw, new = draw(st.sampled_from(_RAW)), _MARK
        if not path or (action == "add" and not isinstance(_parent(value, path), dict)):
            if action in ("value", "raw"):
                value = new
            continue
        place = _parent(value, path)
        if action in ("value", "raw"):
            place[path[-1]] = new
        elif action == "drop":
            del place[path[-1]]
        elif action == "add":
            key = draw(st.one_of(st.sampled_from(["", "a", "é", "../x", "z" * 50_000]), st.text()))
            place[key] = new
        elif action == "swap" and len(place) > 1:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            other = draw(st.sampled_from(keys))
            place[path[-1]], place[other] = place[other], place[path[-1]]
        else:
            twice = True
    text = json.dumps(value)
    if raw is not None:
        text = text.replace(json.dumps(_MARK), raw)
    if twice and text.startswith("{") and len(text) > 2:
        text = "{" + text[1:-1] + "," + text[1:]
    return mutated_bytes(draw, text.encode("utf-8", "surrogatepass"))


def mutated_bytes(draw: Any, data: bytes) -> bytes:
    """Mostly as it is; else cut off, lengthened, or with a few bytes changed."""
    action = draw(st.sampled_from(["", "", "", "", "cut", "grow", "flip", "bom"]))
    if action == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if action == "grow":
        return data + draw(st.binary(min_size=1, max_size=40))
    if action == "bom":
        return b"\xef\xbb\xbf" + data
    if action == "flip" and data:
        changed = bytearray(data)
        for _ in range(draw(st.integers(1, 4))):
            changed[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        return bytes(changed)
    return data


def mutated_shard(draw: Any, header: dict[str, Any], data: bytes) -> bytes:
    raw = mutated_json(draw, header)
    length = len(raw)
    if draw(st.integers(0, 5)) == 0:
        length = draw(
            st.sampled_from([0, 1, 7, max(length - 1, 0), length + 1, 2**31, 2**63, 2**64 - 1])
        )
    return length.to_bytes(8, "little") + raw + mutated_bytes(draw, data)


def split_shard(path: pathlib.Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def number_of_cases(fast: int, slow: int) -> Any:
    """Parameters for max_examples: few in the fast suite, many in the slow one."""
    return pytest.mark.parametrize(
        "cases", [fast, pytest.param(slow, marks=pytest.mark.slow)], ids=["few", "many"]
    )
