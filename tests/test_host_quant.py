"""Quantization on the host: the same bits as the specification in qwen_jax.quant."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert.host_quant import nf4_scales, rows_into
from qwen_jax.quant import QuantFormat, quantize

pytestmark = pytest.mark.optimized

FORMATS = [
    QuantFormat(kind="int8", group=0),
    QuantFormat(kind="int8", group=128),
    QuantFormat(kind="int4", group=128),
    QuantFormat(kind="nf4", group=64),
]
BF16 = ml_dtypes.bfloat16


def normal(shape, scale=0.02, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32) * scale


def every_bfloat16():
    """All finite bfloat16, shuffled so that groups mix magnitudes: subnormal to 3e38."""
    values = np.arange(65536, dtype=np.uint16).view(BF16)
    values = values[np.isfinite(values.astype(np.float32))]
    return np.random.default_rng(0).permutation(values)[: 254 * 256].reshape(-1, 256)


def rising(scale):
    """Rows of many scales, and rows of zeros between them."""
    w = normal((64, 256)) * np.logspace(-1, scale, 64, dtype=np.float32)[:, None]
    w[::7] = 0
    return w.astype(np.float32)


CASES = {
    "one_chunk": lambda: normal((48, 256)).astype(BF16),
    "many_chunks": lambda: normal((300, 2048)).astype(BF16),
    "long_rows": lambda: normal((3, 140_032)).astype(BF16),
    "float32": lambda: normal((40, 384)),
    "float16": lambda: normal((40, 384)).astype(np.float16),
    "zeros": lambda: np.zeros((4, 128), BF16),
    "exact_ties": lambda: (np.arange(-128, 128, dtype=np.float32) / 2)[None].repeat(3, 0),
    "small": lambda: rising(-44),
    "large": lambda: rising(35).astype(BF16),
    "every_bfloat16": every_bfloat16,
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # scales above 65504 in fp16, sums of 3e38
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.kind}-{f.group}")
def test_same_bits_as_the_specification(case, fmt):
    w = CASES[case]()
    want = quantize(jnp.asarray(w), fmt)
    got = {name: np.empty(s, d) for name, (s, d) in fmt.shapes(w.shape[:1], w.shape[1]).items()}
    if fmt.kind == "nf4":
        absmax = np.empty(got["scale"].shape, np.float32)
        rows_into(w, fmt, got["data"], absmax)
        got |= nf4_scales(absmax)
    else:
        rows_into(w, fmt, got["data"], got["scale"])
    for name, array in got.items():
        expected = np.asarray(getattr(want, name))
        assert array.dtype == expected.dtype and array.shape == expected.shape
        np.testing.assert_array_equal(array, expected, err_msg=name)


def test_zeros_stay_zeros_beside_others():
    """The code of 0.0 is 7; a group of zeros once got -1.0 times a scale near zero."""
    w = normal((4, 128))
    w[1] = 0
    data, absmax = np.empty((4, 64), np.uint8), np.empty((4, 2), np.float32)
    rows_into(w, QuantFormat(kind="nf4", group=64), data, absmax)
    assert (data[1] == 0x77).all() and (absmax[1] == 0).all()
