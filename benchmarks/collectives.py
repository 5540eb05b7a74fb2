"""What a compiled program sends between devices, counted from its HLO text.

    HLO text -> [Collective(kind, dtypes, bytes, group, times)], with the trip counts of loops

Bytes are those that one device sends (and receives) with ring algorithms, the least that any needs:
an all-gather of a result of n bytes over g devices n (g-1)/g, a reduce-scatter the same of its
operand, an all-reduce both. It knows nothing of models.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_OPERATION = re.compile(rf"= (\(.*?\)|\S+) ({_KINDS})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|bf16|[fsu]\d+(?:e\d\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation|branch_computations)="
    r"(?:\{([^}]*)\}|(%?[\w.\-]+))"
)
_TRIPS = re.compile(r"known_trip_count[^\d]{1,8}n[^\d]{1,4}(\d+)")
_ORDER = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_MESH = re.compile(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_ORDER}\))? \{{([^}}]*)\}}")
_HEAD = re.compile(r"^(ENTRY )?(%?[\w.\-]+) .*\{\s*$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective operation of the program."""

    kind: str
    dtypes: tuple[str, ...]  # of the arrays that it moves, each once
    size: int  # bytes of its result on one device (of a reduce-scatter: of its operand)
    members: tuple[int, ...]  # devices of the first group, by their place in the mesh
    times: int  # how often a run of the program does it
    place: str  # op_name: the path of the function that it stems from

    @property
    def group(self) -> int:
        """Devices that take part."""
        return len(self.members)

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a run of the program."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0 if self.group > 1 else 0.0}
        return self.times * self.size * factor.get(self.kind, share)


def collectives(text: str, unknown: int | None = None) -> list[Collective]:
    """All collective operations of a compiled program, `compiled.as_text()`.

    A loop that ends by a condition counts `unknown` times; by default it is refused (ValueError).
    """
    bodies, entry = _computations(text)
    times = _times(bodies, entry, unknown)
    found = []
    for name, lines in bodies.items():
        for line in lines if times[name] else ():
            if match := _OPERATION.search(line):
                found.append(_collective(line, match, times[name]))
    return [one for one in found if one.group > 1]


def sent_by_kind(found: list[Collective]) -> dict[str, float]:
    """Bytes that a device sends in a run, by kind of operation, largest first."""
    total: collections.Counter[str] = collections.Counter()
    for one in found:
        total[one.kind] += one.sent
    return dict(total.most_common())


def _collective(line: str, match: re.Match, times: int) -> Collective:
    result, kind, start = match.groups()
    _, apart, results = result.partition("), ") if result.startswith("((") else ("", "", "")
    arrays = arrays_of(results if apart else result)
    # A start gives its operands back beside its results, from some version on in a tuple of their
    # own; before that all-reduce alone did not.
    if start and not apart and kind != "all-reduce" and len(arrays) > 1:
        arrays = [a for a in arrays if a[0] not in ("u32", "s32") or a[1] > 4] or arrays
        arrays = arrays[len(arrays) // 2 :]
    members = _members(line)
    size = sum(size for _, size in arrays)
    place = re.search(r'op_name="([^"]*)"', line)
    return Collective(
        kind=kind,
        dtypes=tuple(sorted({dtype for dtype, _ in arrays})),
        size=size * len(members) if kind == "reduce-scatter" else size,
        members=members,
        times=times,
        place=place[1] if place else "",
    )


def arrays_of(result: str) -> list[tuple[str, int]]:
    """(dtype, bytes) of each array in a result as HLO writes it: bf16[2,8], or a tuple of them."""
    return [(dtype, _bytes(dtype, shape)) for dtype, shape in _ARRAY.findall(result)]


def _bytes(dtype: str, shape: str) -> int:
    bits = _BITS.get(dtype) or int(re.match(r"[fsu](\d+)", dtype)[1])
    count = 1
    for length in shape.split(","):
        count *= int(length or 1)
    return -(-count * bits // 8)


def _members(line: str) -> tuple[int, ...]:
    """The first group: of {{0,1},{2,3}}, of [2,2]<=[4], or of mesh['x'=2,'y'=2] {'y'}."""
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", line):
        return tuple(_numbers(match[1]))
    if match := re.search(rf"replica_groups=\[([\d,]+)\]<={_ORDER}", line):
        return tuple(_ordered(match[2], match[3]).reshape(_numbers(match[1]))[0].tolist())
    if match := _MESH.search(line):
        return _members_of_axes(*match.groups())
    raise ValueError(f"no replica groups in {line.strip()[:300]!r}")


def _members_of_axes(mesh: str, dims: str | None, order: str | None, named: str) -> tuple[int, ...]:
    sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = _ordered(dims or str(math.prod(sizes.values())), order)
    # An axis may be named in part: 'x':(before)size.
    parts = {axis: (b, n) for axis, b, n in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named)}
    shape, chosen = [], []
    for axis, size in sizes.items():
        if axis not in parts:
            shape.append(size)
            continue
        before, part = int(parts[axis][0] or 1), int(parts[axis][1] or size)
        chosen.append(len(shape) + 1)
        shape += [before, part, size // before // part]
    ids = np.moveaxis(ids.reshape(shape), chosen, range(-len(chosen), 0))
    group = math.prod(shape[place] for place in chosen)
    return tuple(ids.reshape(-1, group)[0].tolist())


def _ordered(dims: str, order: str | None) -> np.ndarray:
    """Device numbers as [2,4]T(1,0) lists them."""
    ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Name -> lines of every computation, and the name of the entry."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if not line.startswith(" ") and (head := _HEAD.match(line)):
            current = bodies.setdefault(head[2].lstrip("%"), [])
            entry = head[2].lstrip("%") if head[1] else entry
        elif line.startswith(" ") and current is not None:
            current.append(line)
    if not entry:
        raise ValueError("this is no HLO text: it has no ENTRY")
    return bodies, entry


def _times(
    bodies: dict[str, list[str]], entry: str, unknown: int | None
) -> collections.Counter[str]:
    """How often each computation runs: loops multiply, what is called twice adds up."""
    times: collections.Counter[str] = collections.Counter()

    def run(name: str, count: int) -> None:
        times[name] += count
        for line in bodies.get(name, ()):
            for called in _called(line):
                trips = 1
                if " while(" in line:
                    match = _TRIPS.search(line)
                    trips = int(match[1]) if match else unknown
                    if trips is None:
                        raise ValueError(f"a loop of unknown length: {line.strip()[:200]}")
                run(called, count * trips)

    run(entry, 1)
    return times


def _called(line: str) -> Iterator[str]:
    for several, one in _CALLED.findall(line):
        for name in (several or one).split(","):
            yield name.strip().lstrip("%")
