"""Safetensors folders: the safetensors library is the independent reader and writer.

Damaged folders must give an InputError of one line; damaged bytes, whatever they are, either that
or what the library reads from them too.
"""

import json
import os
import pathlib
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file

from convert import hf_files
from convert.hf_files import INDEX_NAME, HfWeights, check_finite
from convert.hf_writer import plan_shards, write_sharded
from qwen_jax.errors import InputError

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
ALL_DTYPES = pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)


def random_array(shape, dtype=BF16, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert got.tobytes() == expected.tobytes()


def one_line(caught: pytest.ExceptionInfo) -> str:
    message = str(caught.value)
    assert "\n" not in message and message.isprintable() and len(message) < 2000
    return message


def raw_shard(header, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(shape, begin, end, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_index(folder, weight_map, **metadata) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))


@pytest.fixture
def two_shards(tmp_path) -> pathlib.Path:
    """A good folder: "a" and "b" in shard 1, "c" in shard 2, 56 bytes of data."""
    save_file({"a": random_array((3, 4)), "b": random_array(4)}, tmp_path / "m1.safetensors")
    save_file({"c": random_array((2, 3), F32)}, tmp_path / "m2.safetensors")
    write_index(
        tmp_path,
        {"a": "m1.safetensors", "b": "m1.safetensors", "c": "m2.safetensors"},
        total_size=56,
    )
    return tmp_path


# Reading what the library wrote.


@ALL_DTYPES
def test_reads_what_the_library_wrote(tmp_path, dtype):
    tensors = {
        "matrix": random_array((7, 5), dtype),
        "cube": random_array((3, 2, 4), dtype, 1),
        "scalar": random_array((), dtype),
        "empty": np.zeros((0, 5), dtype),
        "empty_columns": np.zeros((5, 0), dtype),
    }
    save_file(tensors, tmp_path / "anything.safetensors", metadata={"format": "pt"})
    weights = HfWeights(tmp_path)
    assert weights.names() == sorted(tensors)
    assert weights.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert (weights.shape(name), weights.dtype(name)) == (tensor.shape, dtype)
        assert_same_bits(weights.read(name), tensor)
    for rows in (slice(2, 5), slice(0, 0), slice(5, 99), slice(-2, None), slice(5, 2), slice(None)):
        assert_same_bits(weights.read("matrix", rows), tensors["matrix"][rows])
        assert_same_bits(weights.read("cube", rows), tensors["cube"][rows])
        assert_same_bits(weights.read("empty", rows), tensors["empty"][rows])
    with pytest.raises(ValueError, match="step"):
        weights.read("matrix", slice(0, 4, 2))


def test_reads_an_index(two_shards):
    weights = HfWeights(str(two_shards))
    assert weights.names() == ["a", "b", "c"]
    assert weights.total_bytes == 56
    assert_same_bits(weights.read("c"), load_file(two_shards / "m2.safetensors")["c"])


def test_reads_symlinks_of_the_hugging_face_cache(two_shards, tmp_path_factory):
    blobs = two_shards.rename(two_shards.parent / "blobs")
    snapshot = two_shards.parent / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert_same_bits(HfWeights(snapshot).read("a"), random_array((3, 4)))
    (blobs / "m2.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks 1 of 2 shards .*m2\.safetensors"):
        HfWeights(snapshot)


def test_a_few_rows_take_the_memory_of_a_few_rows(tmp_path):
    save_file({"w": np.zeros((4096, 4096), np.float16)}, tmp_path / "model.safetensors")
    weights = HfWeights(tmp_path)
    tracemalloc.start()
    try:
        assert weights.read("w", slice(1000, 1010)).shape == (10, 4096)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200_000, "10 rows are 81,920 bytes, the tensor is 33,554,432"


def test_int32_only_when_asked_for(tmp_path):
    tensor = np.arange(-3, 3, dtype=np.int32)
    save_file({"qweight": tensor}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"'qweight' has dtype 'I32'; expected .*BF16, F16, F32"):
        HfWeights(tmp_path)
    weights = HfWeights(tmp_path, dtypes=(*hf_files.FLOAT_DTYPES, "I32"))
    assert_same_bits(weights.read("qweight"), tensor)


def test_unknown_tensor_is_named(two_shards):
    with pytest.raises(InputError, match="has no tensor 'aa'; did you mean 'a'"):
        HfWeights(two_shards).read("aa")


@pytest.mark.parametrize("size", [-1, 1])
def test_a_file_that_changes_after_open_is_an_error(two_shards, size):
    weights = HfWeights(two_shards)
    path = two_shards / "m2.safetensors"
    os.truncate(path, path.stat().st_size + size)
    with pytest.raises(InputError, match="changed since it was opened"):
        weights.read("c", slice(0, 1))
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        weights.read("c")


# Folders that are not right.


def rewrite_index(folder, **changes) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"] |= changes
    (folder / INDEX_NAME).write_text(json.dumps(index))


def index_as(text):
    return lambda folder: (folder / INDEX_NAME).write_text(text)


def place_c(shard):
    return lambda folder: rewrite_index(folder, c=shard)


def only_pickle(folder):
    for path in folder.iterdir():
        path.unlink()
    (folder / "pytorch_model-00001-of-00001.bin").write_bytes(b"\x80\x02")


def no_weights(folder):
    for path in folder.iterdir():
        path.unlink()
    (folder / "config.json").write_text("{}")


def one_shard_without_index(folder):
    no_weights(folder)
    save_file({"a": random_array(2)}, folder / "model-00001-of-00019.safetensors")


def tensor_twice(folder):
    save_file({"c": random_array((2, 3), F32), "b": random_array(4)}, folder / "m2.safetensors")


def extra_tensor(folder):
    save_file({"c": random_array((2, 3), F32), "d": random_array(4)}, folder / "m2.safetensors")


def other_size(folder):
    save_file({"c": random_array((2, 4), F32)}, folder / "m2.safetensors")


FOLDER_FAULTS = {
    "only pickle": (only_pickle, "only pickled weights .*never read; convert them"),
    "nothing": (no_weights, "has no weights; expected model.safetensors.index.json or"),
    "index lost": (lambda f: (f / INDEX_NAME).unlink(), "but no model.safetensors.index.json"),
    "first of 19": (one_shard_without_index, "but no model.safetensors.index.json"),
    "two models": (
        lambda f: save_file({"a": random_array(2)}, f / "model.safetensors"),
        "two models",
    ),
    "shard lost": (lambda f: (f / "m1.safetensors").unlink(), "lacks 1 of 2 .*'m1.safetensors'"),
    "index is a folder": (lambda f: ((f / INDEX_NAME).unlink(), (f / INDEX_NAME).mkdir()), "file"),
    "index is a dead link": (
        lambda f: ((f / INDEX_NAME).unlink(), (f / INDEX_NAME).symlink_to("gone")),
        "is not a file",
    ),
    "index empty": (index_as(""), "not valid JSON"),
    "index truncated": (index_as('{"weight_map": {"a": "m1.sa'), "not valid JSON"),
    "index a list": (index_as("[]"), "expected a JSON object"),
    "index deep": (index_as('{"weight_map": ' + "[" * 100_000), "cannot be read|not valid JSON"),
    "index key twice": (index_as('{"weight_map": {"a": "x", "a": "y"}}'), "'a' stands twice"),
    "index not UTF-8": (lambda f: (f / INDEX_NAME).write_bytes(b'{"\xff": 1}'), "cannot be read"),
    "no weight_map": (index_as('{"metadata": {}}'), "has no weight_map"),
    "weight_map empty": (index_as('{"weight_map": {}}'), "has no weight_map"),
    "weight_map a list": (index_as('{"weight_map": ["a"]}'), "has no weight_map"),
    "metadata a list": (index_as('{"metadata": [], "weight_map": {"a": "b"}}'), "wrong metadata"),
    "absolute": (place_c("/etc/m2.safetensors"), "places 'c' in '/etc/m2.*expected the plain name"),
    "parent": (place_c("../m2.safetensors"), "expected the plain name"),
    "subfolder": (place_c("x/m2.safetensors"), "expected the plain name"),
    "backslash": (place_c("..\\m2.safetensors"), "expected the plain name"),
    "drive": (place_c("c:m2.safetensors"), "expected the plain name"),
    "nul": (place_c("m2\0.safetensors"), "expected the plain name"),
    "surrogate": (place_c("\ud800.safetensors"), "expected the plain name"),
    "dots": (place_c(".."), "expected the plain name"),
    "no name": (place_c(""), "expected the plain name"),
    "pickle in index": (place_c("m2.bin"), "pickle never"),
    "number": (place_c(2), "places 'c' in 2; expected the plain name"),
    "nested": (place_c([[]]), "places 'c' in a list; expected the plain name"),
    "long name": (place_c("m" * 5000 + ".safetensors"), r"mmm\.\.\.; expected the plain"),
    "total_size": (lambda f: write_index(f, {"c": "m2.safetensors"}, total_size=23), "total_size"),
    "total_size text": (lambda f: write_index(f, {"c": "m2.safetensors"}, total_size="24"), "'24'"),
    "total_size true": (lambda f: write_index(f, {"c": "m2.safetensors"}, total_size=True), "True"),
    "wrong shard": (place_c("m1.safetensors"), "m1.safetensors lacks 'c'"),
    "unknown in index": (lambda f: rewrite_index(f, d="m2.safetensors"), "lacks 'd', which"),
    "unknown in shard": (extra_tensor, "has 'd', which .* does not name"),
    "tensor twice": (tensor_twice, "stands twice"),
    "other model": (other_size, "says total_size 56 but the shards have 64"),
}


@pytest.mark.parametrize("case", FOLDER_FAULTS)
def test_wrong_folder_is_one_clear_line(two_shards, case):
    break_it, message = FOLDER_FAULTS[case]
    break_it(two_shards)
    with pytest.raises(InputError, match=message) as caught:
        HfWeights(two_shards)
    assert str(two_shards) in one_line(caught)


def test_not_a_folder(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        HfWeights(tmp_path / "nowhere")


@pytest.mark.parametrize("metadata", [{}, {"total_size": 24.0}, {"total_parameters": 6}])
def test_total_size_is_optional_and_may_be_written_as_a_float(two_shards, metadata):
    (two_shards / "m1.safetensors").unlink()
    write_index(two_shards, {"c": "m2.safetensors"}, **metadata)
    assert HfWeights(two_shards).names() == ["c"]


# Shards that are not right.

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
SHARD_FAULTS = {
    "empty": (b"", "has 0 bytes"),
    "short": (b"\x02\0\0\0\0\0\0\0{", "has 9 bytes"),
    "pointer": (LFS, "git lfs pull"),
    "zeros": (b"\0" * 100, "header that is not"),
    "header past the end": (raw_shard({})[:-1], "bytes and says that its header has 2"),
    "header huge": (b"\xff" * 16, "header has 18446744073709551615"),
    "not JSON": (raw_shard(b"{'a': 1}"), "not valid JSON"),
    "not UTF-8": (raw_shard(b'{"\xff": 1}'), "not valid JSON"),
    "UTF-16": (raw_shard('{"a": 1}'.encode("utf-16")), "not valid JSON"),
    "list": (raw_shard([]), "not a JSON object"),
    "space first": (raw_shard(b" {}"), "not a JSON object"),
    "deep": (raw_shard(b"{" + b'"a":{' * 50_000), "not valid JSON"),
    "long number": (raw_shard(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "nothing inside": (raw_shard({}), "holds no tensors"),
    "key twice": (raw_shard(b'{"a": 1, "a": 2}'), "stands twice"),
    "metadata": (raw_shard({"__metadata__": {"format": 1}}), "__metadata__"),
    "no description": (raw_shard({"a": None}), "'a' is not given as dtype"),
    "shape lost": (raw_shard({"a": {"dtype": "F32", "data_offsets": [0, 4]}}), "not given as"),
    "extra field": (raw_shard({"a": entry([1], 0, 4) | {"x": 1}}, b"1234"), "not given as"),
    "float8": (raw_shard({"a": entry([4], 0, 4, "F8_E4M3")}, b"1234"), "has dtype 'F8_E4M3'"),
    "dtype a list": (raw_shard({"a": entry([1], 0, 4, ["F32"])}, b"1234"), "has dtype a list"),
    "newline in name": (raw_shard({"a\nb": entry([1], 0, 4)}, b"1234"), "printable name"),
    "surrogate in name": (raw_shard({"\ud800": entry([1], 0, 4)}, b"1234"), "printable name"),
    "shape a number": (raw_shard({"a": entry(1, 0, 4)}, b"1234"), "impossible shape 1"),
    "shape negative": (raw_shard({"a": entry([-1, -1], 0, 4)}, b"1234"), "impossible shape"),
    "shape float": (raw_shard({"a": entry([1.0], 0, 4)}, b"1234"), "impossible shape"),
    "shape true": (raw_shard({"a": entry([True], 0, 4)}, b"1234"), "impossible shape"),
    "nine dimensions": (raw_shard({"a": entry([1] * 9, 0, 4)}, b"1234"), "impossible shape"),
    "shape giant": (raw_shard({"a": entry([2**62, 2**62], 0, 4)}, b"1234"), "giant shape"),
    "giant but empty": (raw_shard({"a": entry([0, 2**62], 0, 0)}), "giant shape"),
    "size": (raw_shard({"a": entry([2], 0, 4)}, b"1234"), r"\[2\] of F32 needs 8 bytes"),
    "offsets reversed": (raw_shard({"a": entry([1], 4, 0)}, b"1234"), "needs 4 bytes"),
    "offsets negative": (raw_shard({"a": entry([1], -4, 0)}, b"1234"), "needs 4 bytes"),
    "three offsets": (
        raw_shard({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, b"1234"),
        "needs 4 bytes",
    ),
    "overlap": (
        raw_shard({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"123456789012"),
        "'b' begins at byte .* overlap",
    ),
    "same bytes": (
        raw_shard({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"1234"),
        "'b' begins at byte .* overlap",
    ),
    "gap": (raw_shard({"a": entry([1], 4, 8)}, b"12345678"), "'a' begins at byte .* gap"),
    "data short": (raw_shard({"a": entry([2], 0, 8)}, b"1234567"), "is truncated: it has"),
    "data long": (raw_shard({"a": entry([1], 0, 4)}, b"12345"), "longer than it should be"),
    "giant tensor": (raw_shard({"a": entry([2**40], 0, 2**42)}, b"1234"), "is truncated"),
}


@pytest.mark.parametrize("case", SHARD_FAULTS)
def test_wrong_shard_is_one_clear_line(tmp_path, case):
    content, message = SHARD_FAULTS[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        HfWeights(tmp_path)
    assert str(tmp_path / "model.safetensors") in one_line(caught)


def test_a_huge_header_is_refused_unread(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((10**9).to_bytes(8, "little"))
    os.truncate(path, 2 * 10**9)  # sparse: no disk is used
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"header has 1000000000; .*under 100000000 bytes"):
            HfWeights(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


GOOD_SHARD = save(
    {"a": random_array((3, 4)), "bb": random_array((2, 2), F32), "c": random_array(5, F16)},
    metadata={"format": "pt"},
)
HEADER_END = 8 + int.from_bytes(GOOD_SHARD[:8], "little")
# Where a flip hits: the length, the header (most often, there the logic is) or anywhere.
POSITIONS = st.one_of(
    st.integers(0, 7), st.integers(8, HEADER_END - 1), st.integers(0, len(GOOD_SHARD) - 1)
)
# Digits, brackets and letters of the header's own alphabet get further than random bytes.
BYTES = st.one_of(st.sampled_from(sorted(set(GOOD_SHARD[8:HEADER_END]))), st.integers(0, 255))


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@example([], set(), len(GOOD_SHARD), b"")
@given(
    replaced=st.lists(st.tuples(POSITIONS, BYTES), max_size=4),
    deleted=st.sets(POSITIONS, max_size=2),
    keep=st.one_of(st.just(len(GOOD_SHARD)), st.integers(0, len(GOOD_SHARD))),
    appended=st.one_of(st.just(b""), st.binary(max_size=4)),
)
def test_damaged_bytes_are_refused_or_read_as_the_library_reads_them(
    tmp_path_factory, replaced, deleted, keep, appended
):
    content = bytearray(GOOD_SHARD)
    for position, byte in replaced:
        content[position] = byte
    for position in sorted(deleted, reverse=True):
        del content[position]
    check_like_the_library(tmp_path_factory, bytes(content[:keep]) + appended)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=4)
)
SIZES = st.one_of(st.integers(0, 12), st.sampled_from([2**31, 2**63, 2**64, -1]), JUNK)
FIELD = st.one_of(JUNK, st.lists(SIZES, max_size=3), st.sampled_from(["F32", "BF16", "F16", "I8"]))


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]) | st.text(max_size=3),
        st.one_of(
            FIELD,
            st.fixed_dictionaries(
                {
                    "dtype": st.sampled_from(["F32", "BF16", "F16"]) | FIELD,
                    "shape": st.lists(st.integers(0, 4), max_size=3) | FIELD,
                    "data_offsets": st.tuples(st.integers(0, 9), st.integers(0, 9)) | FIELD,
                }
            ),
        ),
        max_size=3,
    ),
    data=st.binary(max_size=16),
)
def test_invented_headers_are_refused_or_read_as_the_library_reads_them(
    tmp_path_factory, header, data
):
    check_like_the_library(tmp_path_factory, raw_shard(header, data))


def check_like_the_library(tmp_path_factory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    path = folder / "model.safetensors"
    path.write_bytes(content)
    try:
        weights = HfWeights(folder)
    except InputError as error:
        assert str(error).isprintable()
        return
    with safetensors.safe_open(path, framework="np") as library:
        assert weights.names() == sorted(library.keys())
        for name in weights.names():
            assert_same_bits(weights.read(name), library.get_tensor(name))


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_index_is_refused_or_still_right(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged_index"
    folder.mkdir(exist_ok=True)
    save_file({"a": random_array(3)}, folder / "m1.safetensors")
    good = json.dumps({"metadata": {"total_size": 6}, "weight_map": {"a": "m1.safetensors"}})
    content = bytearray(good.encode())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[position] = data.draw(st.sampled_from(sorted(set(content))) | st.integers(0, 255))
    (folder / INDEX_NAME).write_bytes(content[: data.draw(st.integers(0, len(content)))] or content)
    try:
        weights = HfWeights(folder)
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert_same_bits(weights.read("a"), random_array(3))


# NaN and Inf.


@ALL_DTYPES
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_check_finite_names_the_first_place(dtype, value):
    array = np.zeros((300, 500), dtype)
    array[[222, 250], [7, 0]] = value
    with pytest.raises(InputError, match=rf"tensor 'w' has {value} at \[222, 7\]"):
        check_finite(array, "w")
    with pytest.raises(InputError, match=r"at \[1222, 7\]"):
        check_finite(array, "w", first_row=1000)
    with pytest.raises(InputError, match=r"at \[0, 250\]"):
        check_finite(array.T, "w")


@ALL_DTYPES
def test_check_finite_agrees_with_numpy_on_every_kind_of_number(dtype):
    if dtype == F32:
        rng = np.random.default_rng(0)
        bits = rng.integers(0, 2**32, 10_000, dtype=np.uint32)
        bits[:3000] |= np.uint32(0x7F000000)  # near the edge
    else:
        bits = np.arange(2**16, dtype=np.uint16)  # all there are
    numbers = bits.view(dtype)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        finite = np.isfinite(numbers.astype(np.float64))
    assert 0 < finite.sum() < len(numbers)
    check_finite(numbers[finite], "w")
    for bad in np.flatnonzero(~finite)[:200]:
        with pytest.raises(InputError, match=r"at \[\]"):
            check_finite(numbers[bad : bad + 1].reshape(()), "w")


def test_check_finite_passes_empty_and_integer_arrays():
    check_finite(np.zeros((0, 3), BF16), "w")
    check_finite(np.full(3, 0x7F80, np.int32), "w")


# Writing, checked by the library.


def blocks(array: np.ndarray, rows: int = 3):
    return (array[i : i + rows] for i in range(0, len(array), rows))


def as_streams(tensors: dict[str, np.ndarray]):
    for name, array in tensors.items():
        stream = blocks(array) if array.ndim else [array]
        yield name, array.shape, array.dtype, stream


def example_tensors() -> dict[str, np.ndarray]:
    return {
        "wte": random_array((10, 4)),  # 80 bytes
        "odd": random_array(3, F16, 1),  # 6
        "h.10": random_array((4, 4), F32, 2),  # 64
        "h.9": random_array((2, 2, 4), BF16, 3),  # 32
        "scalar": random_array((), F32, 4),  # 4
        "empty": np.zeros((0, 4), BF16),  # 0
        "turned": random_array((4, 6), F32, 5).T,  # 96, not contiguous
    }


def test_library_reads_several_shards(tmp_path):
    tensors = example_tensors()
    plan = plan_shards(as_streams(tensors), 90)
    files = write_sharded(tmp_path / "new" / "out", as_streams(tensors), max_shard_bytes=90)
    folder = tmp_path / "new" / "out"
    # 80 + 6 fit 90; 64 alone; 32 + 4 + 0 fit; 96 is over 90 and alone.
    assert files == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)] == list(plan)
    assert sorted(path.name for path in folder.iterdir()) == [*files, INDEX_NAME]
    index = json.loads((folder / INDEX_NAME).read_text())
    assert index["metadata"] == {"total_size": 282}
    assert list(index["weight_map"]) == sorted(tensors)
    for name, shard in index["weight_map"].items():
        with safetensors.safe_open(folder / shard, framework="np") as library:
            assert library.metadata() == {"format": "pt"}
            assert_same_bits(library.get_tensor(name), tensors[name])
    weights = HfWeights(folder)
    assert weights.names() == sorted(tensors)
    for name, tensor in tensors.items():
        assert_same_bits(weights.read(name), tensor)


def test_one_shard_has_no_index_and_every_tensor_is_aligned(tmp_path):
    tensors = example_tensors()
    assert write_sharded(tmp_path, as_streams(tensors)) == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert sorted(loaded) == sorted(tensors)
    for name, tensor in tensors.items():
        assert_same_bits(loaded[name], tensor)
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0


def test_rewriting_what_the_library_wrote_gives_the_same_tensors(two_shards, tmp_path_factory):
    source, target = HfWeights(two_shards), tmp_path_factory.mktemp("target")
    write_sharded(
        target,
        (
            (name, source.shape(name), source.dtype(name), blocks(source.read(name)))
            for name in source.names()
        ),
    )
    expected = load_file(two_shards / "m1.safetensors") | load_file(two_shards / "m2.safetensors")
    written = load_file(target / "model.safetensors")
    assert sorted(written) == sorted(expected)
    for name, tensor in expected.items():
        assert_same_bits(written[name], tensor)


def test_blocks_are_made_one_at_a_time_in_the_order_given(tmp_path):
    made = []

    def rows(name):
        for i in range(2):
            made.append((name, i))
            yield np.zeros((1, 4), F32)

    tensors = [(name, (2, 4), F32, rows(name)) for name in ("z", "a")]
    plan_shards(tensors, 40)
    assert made == []
    write_sharded(tmp_path, tensors, max_shard_bytes=40)
    assert made == [("z", 0), ("z", 1), ("a", 0), ("a", 1)]


@pytest.mark.parametrize(
    "wrong",
    [
        [np.zeros((1, 4), F32)],
        [np.zeros((3, 4), F32)],
        [np.zeros((2, 5), F32)],
        [np.zeros(8, F32)],
        [np.zeros((2, 4), F16)],
        [],
    ],
    ids=["few rows", "many rows", "columns", "flat", "dtype", "none"],
)
def test_blocks_that_are_not_the_tensor_leave_nothing(tmp_path, wrong):
    good = ("a", (2, 4), F32, [np.ones((2, 4), F32)])
    with pytest.raises(ValueError, match="'b' got"):
        write_sharded(tmp_path, [good, ("b", (2, 4), F32, wrong)], max_shard_bytes=32)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_visible_until_all_is_written(tmp_path):
    def rows():
        yield np.zeros((1, 4), F32)
        assert not list(tmp_path.glob("[!.]*")), "no finished name while a block is missing"
        with pytest.raises(InputError, match="no weights"):
            HfWeights(tmp_path)
        raise RuntimeError("the source failed")

    tensors = [("a", (1, 4), F32, [np.zeros((1, 4), F32)]), ("b", (2, 4), F32, rows())]
    with pytest.raises(RuntimeError, match="the source failed"):
        write_sharded(tmp_path, tensors, max_shard_bytes=16)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_weights_is_not_overwritten(two_shards):
    before = {path.name: path.read_bytes() for path in two_shards.iterdir()}
    with pytest.raises(InputError, match=r"already holds 'm1\.safetensors'.*empty folder"):
        write_sharded(two_shards, as_streams({"a": random_array(3)}))
    assert {path.name: path.read_bytes() for path in two_shards.iterdir()} == before


def test_a_disk_too_small_is_known_before_the_first_byte(tmp_path):
    def never():
        raise AssertionError("asked for a block")
        yield

    with pytest.raises(InputError, match=r"bytes free, 4611686018427387904 are needed"):
        write_sharded(tmp_path, [("a", (2**60,), F32, never())])
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_target_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="weights cannot be written to") as caught:
        write_sharded(tmp_path / "file", as_streams({"a": random_array(3)}))
    one_line(caught)


def test_the_plan_refuses_names_twice_unknown_dtypes_and_nothing():
    for tensors in ([("a", (1,), F32, []), ("a", (1,), F32, [])], [("a", (1,), "f8", [])], []):
        with pytest.raises(ValueError, match=r"'a' stands twice or has dtype|no tensors"):
            plan_shards(tensors, 100)
