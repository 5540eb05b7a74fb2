"""The scaling benchmark: its definitions by hand, and a whole run of the toy."""

import shlex

import pytest

from benchmarks import scaling, scaling_model
from benchmarks.collectives import Collective
from qwen_jax.errors import UsageError
from qwen_jax.sharding import parse_mesh

ONE = {"tokens": 2048, "seconds": 1.0, "devices": 1, "computed": 10.0, "losses": [12.0, 11.5]}


@pytest.mark.parametrize("flag", ["rows", "seq", "steps"])
def test_nothing_to_time_is_refused(flag):
    with pytest.raises(UsageError, match=f"--{flag} is 0; expected at least 1"):
        scaling.main([f"--{flag}", "0", "--toy"])


def test_exposed_is_what_a_device_takes_beyond_its_share_of_the_work():
    data = ONE | {"tokens": 4096, "seconds": 1.1, "devices": 2}
    assert scaling.exposed(data, ONE) == pytest.approx(0.1)
    tensor = ONE | {"seconds": 0.6, "devices": 2}
    assert scaling.exposed(tensor, ONE) == pytest.approx(0.1)
    # A mesh with more memory recomputes less: that is less work, not less communication.
    assert scaling.exposed(data | {"computed": 8.0}, ONE) == pytest.approx(0.3)
    assert scaling.difference(ONE | {"losses": [12.0, 11.6]}, ONE) == pytest.approx(0.1 / 11.5)


def collective(kind, size, members, times, place="", dtypes=("u8",)):
    return Collective(
        kind=kind, dtypes=dtypes, size=size, members=members, times=times, place=place
    )


def test_model_hides_gathers_but_the_first_and_never_sums_over_tensor():
    args = scaling_model.Args(
        step_seconds=1.0, nvlink=100.0, network=10.0, efficiency=0.5, latency=0.0, gpus_a_host=2
    )
    layers, pair = 10, (0, 1)
    gathers = [
        collective("all-gather", size, pair, layers, place)
        for place in ("jvp()/while", "transpose(jvp())/while")
        for size in (200_000_000, 100_000_000)
    ]
    # 2 passes x 10 layers x 300 MB / 2 over 50 GB/s is 60 ms, two thirds of it for the larger one.
    found = scaling_model.estimate(args, parse_mesh("fsdp=2"), gathers)
    assert found.nvlink == pytest.approx(3.0) and found.network == 0
    assert found.apart == pytest.approx(1.06) and found.together == pytest.approx(1.04)
    # Floats are counted at half: 2 x 1/2 x 100 MB x 10, halved, over 50 GB/s.
    sums = [collective("all-reduce", 100_000_000, pair, layers, "jvp()", ("f32",))]
    found = scaling_model.estimate(args, parse_mesh("tensor=2"), sums)
    assert found.compute == 0.5 and found.apart == found.together == pytest.approx(0.51)
    # Members on both hosts: the network's speed, 5 GB/s; as a sum of gradients whole, and hidden.
    across = [collective("all-reduce", 100_000_000, (0, 2), layers, "jvp()", ("f32",))]
    found = scaling_model.estimate(args, parse_mesh("data=2,fsdp=2"), across)
    assert found.network == pytest.approx(1.0) and found.nvlink == 0
    assert found.apart == pytest.approx(1.2) and found.together == pytest.approx(1.0)


@pytest.mark.slow
def test_toy_run_prints_a_row_for_each_mesh_with_equal_losses(capfd):
    flags = "--toy --layers 2 --seq 64 --steps 1 --base int8 --meshes fsdp=2 tensor=2"
    scaling.main(shlex.split(flags))
    rows = [line for line in capfd.readouterr().out.splitlines() if "s/step" in line]
    assert [row.split()[0] for row in rows] == ["1", "fsdp=2", "tensor=2"]
    for row in rows[1:]:
        assert "of 2" in row and "sent" in row and "exposed" in row
        assert "differs by" in row and "TOO MUCH" not in row
