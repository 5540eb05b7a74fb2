"""Where the device's time goes: the kernels of a traced run, summed by name."""

import collections
import pathlib

import jax


def kernel_table(folder: pathlib.Path, steps: int, top: int = 40) -> str:
    """Milliseconds a step of each kernel in a trace that jax.profiler wrote; longest first."""
    (path,) = sorted(folder.rglob("*.xplane.pb"))[-1:]
    data = jax.profiler.ProfileData.from_file(str(path))
    time, count, detail, spans = collections.Counter(), collections.Counter(), {}, []
    for plane in data.planes:
        if not plane.name.startswith("/device:GPU:0"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = {key: value for key, value in event.stats}
                key = (event.name[:60], str(stats.get("hlo_op", "")))
                time[key] += event.duration_ns
                count[key] += 1
                spans.append((event.start_ns, event.start_ns + event.duration_ns))
                detail[key] = str(stats.get("tf_op") or stats.get("name") or "")[-90:]
    total = sum(time.values())
    lines = [
        f"kernels: {total / 1e6 / steps:.2f} ms a step, in {covered(spans) / 1e6 / steps:.2f} ms, "
        "as some run at once"
    ]
    for key, spent in time.most_common(top):
        lines.append(
            f"{spent / 1e6 / steps:8.3f} ms {count[key] // steps:5d}x "
            f"{spent / count[key] / 1e3:8.1f} us  {key[1]:<32.32} {key[0]:<44.44} {detail[key]}"
        )
    return "\n".join(lines)


def covered(spans: list[tuple[float, float]]) -> float:
    """Time in which at least one of the spans (start, end) runs."""
    total, end = 0.0, -float("inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
