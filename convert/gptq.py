"""The official Int4 and Int8 checkpoints: GPTQ files whose codes and scales are taken as they are.

For each linear layer of K inputs and N outputs a file holds, in the layout of AutoGPTQ:

    qweight  int32 [K*bits/32, N]    codes along K, the first in the lowest bits
    qzeros   int32 [K/128, N*bits/32]  zero points along N, each stored minus one
    scales   fp16  [K/128, N]        weight = (code - zero) * scale
    g_idx    int32 [K]               the group of each input: k // 128, without act-order
    bias     fp16  [N]               of c_attn; AutoGPTQ adds one of zeros to every other layer

Ours are [N, K] with the same codes, zero point and fp16 scales, so the import is a transpose and
loses nothing. What our formats cannot hold (act-order, another group size, a zero point off the
middle) is refused. Source: https://github.com/AutoGPTQ/AutoGPTQ, qlinear_cuda_old.py, whose
packing and unpacking the tests compare with. The model itself is not known here.
"""

import dataclasses
import hashlib
import math
import pathlib
from typing import Any

import numpy as np

from convert.hf_files import HfWeights, check_finite
from convert.stream import Arrays, Part
from qwen_jax.errors import InputError, shown
from qwen_jax.files import read_json_object
from qwen_jax.params import ParamSpec
from qwen_jax.quant import INT4_ZERO_POINT, QuantFormat

QUANTIZE_CONFIG = "quantize_config.json"
GROUP = 128
_INT8_ZERO_POINT = 128
_BLOCK_BYTES = 16_000_000  # of qweight, read and transposed at once by one thread


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gptq:
    """What a folder says of its quantization."""

    bits: int  # 4 or 8
    stored_minus_one: bool = True  # the zero points; "gptq_v2" files hold them as they are

    @property
    def fmt(self) -> QuantFormat:
        return QuantFormat(kind=f"int{self.bits}", group=GROUP)

    @property
    def zero_point(self) -> int:
        return INT4_ZERO_POINT if self.bits == 4 else _INT8_ZERO_POINT

    @property
    def stored_zeros(self) -> int:
        """The one byte that all of qzeros must consist of."""
        zero = self.zero_point - self.stored_minus_one
        return zero | zero << 4 if self.bits == 4 else zero


def read_gptq(folder: pathlib.Path) -> Gptq | None:
    """Reads quantize_config.json and config.json's quantization_config; None if there is neither.

    Raises InputError for a quantization that cannot be taken over, with the reason.
    """
    found = {}
    if (folder / QUANTIZE_CONFIG).exists():
        path = folder / QUANTIZE_CONFIG
        found[QUANTIZE_CONFIG] = _parse(str(path), read_json_object(path))
    inner = read_json_object(folder / "config.json").get("quantization_config")
    if inner is not None:
        where = f"{folder / 'config.json'} (quantization_config)"
        found["config.json"] = _parse(where, inner)
    if len(set(found.values())) > 1:
        raise InputError(
            f"{folder}: {QUANTIZE_CONFIG} and config.json disagree on the quantization; expected "
            "the files of one checkpoint, download it again"
        )
    return next(iter(found.values()), None)


def _parse(where: str, values: Any) -> Gptq:
    if not isinstance(values, dict):
        raise InputError(f"{where} is a {type(values).__name__}; expected an object")
    method = values.get("quant_method", "gptq")
    if method != "gptq":
        raise InputError(
            f"{where} has quant_method {shown(method)}; only gptq files can be taken over: "
            "convert the unquantized model with --quantize"
        )
    bits, group = values.get("bits"), values.get("group_size")
    if type(bits) is not int or bits not in (4, 8):
        raise InputError(f"{where} has bits {shown(bits)}; only 4 and 8 have a format here")
    if type(group) is not int or group != GROUP:
        raise InputError(
            f"{where} has group_size {shown(group)}; the int4 and int8 formats hold groups of "
            f"{GROUP}: convert the unquantized model with --quantize int{bits}"
        )
    if values.get("desc_act", False) is not False:
        raise InputError(
            f"{where} has desc_act {shown(values['desc_act'])}: with act-order the inputs of a "
            "group are scattered, and the formats here hold groups of neighbours; convert the "
            f"unquantized model with --quantize int{bits}"
        )
    if values.get("sym", True) is not True:
        raise InputError(
            f"{where} has sym {shown(values['sym'])}; the formats here are symmetric: convert the "
            f"unquantized model with --quantize int{bits}"
        )
    layout = values.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise InputError(
            f"{where} has checkpoint_format {shown(layout)}; only AutoGPTQ's own layout is known"
        )
    return Gptq(bits=bits, stored_minus_one=layout == "gptq")


def linear_tensors(spec: ParamSpec, gptq: Gptq) -> dict[str, tuple[tuple[int, ...], str]]:
    """Suffix -> shape and dtype of the tensors that stand for one torch weight [N, K]."""
    N, K = spec.torch_shape
    gptq.fmt.groups(K)  # InputError if K does not divide
    if N * gptq.bits % 32:
        raise InputError(
            f"{spec.torch_module} has {N} outputs; GPTQ packs {32 // gptq.bits} into a word: "
            "config.json and weights must be of one model"
        )
    return {
        "qweight": ((K * gptq.bits // 32, N), "int32"),
        "qzeros": ((K // GROUP, N * gptq.bits // 32), "int32"),
        "scales": ((K // GROUP, N), "float16"),
        "g_idx": ((K,), "int32"),
    }


def linear_part(weights: HfWeights, spec: ParamSpec, layer: int, gptq: Gptq) -> tuple[Part, bytes]:
    """One layer's weight as a part, codes and scales as in the file; and bytes that identify it.

    Filling raises InputError if the zero points or the groups are not the plain ones, or a scale is
    not a finite number.
    """
    module = spec.torch_module.format(layer=layer)
    names = [f"{module}.{suffix}" for suffix in linear_tensors(spec, gptq)]
    words, N = weights.shape(names[0])
    about = b"".join(
        f"{name} {weights.dtype(name).name} {list(weights.shape(name))}\n".encode()
        for name in names
    )
    about += weights.read(f"{module}.qweight", slice(0, 1)).tobytes()
    about += weights.read(f"{module}.scales", slice(0, 1)).tobytes()
    stamps = "-".join(dict.fromkeys(weights.stamp(name) for name in names))

    def fill(block: slice, arrays: Arrays) -> None:
        if block.start == 0:
            _check_groups(weights.read(f"{module}.g_idx"), module)
            _check_zeros(weights.read(f"{module}.qzeros"), module, gptq)
            scales = weights.read(f"{module}.scales")
            check_finite(scales, f"{module}.scales")
            _transpose(scales, arrays["scale"].reshape(N, -1))
        # The bytes of a word hold its codes in order, the even one in the low nibble: as ours.
        codes = arrays["data"].reshape(N, -1)[:, block.start * 4 : block.stop * 4]
        qweight = weights.read(f"{module}.qweight", block)
        if gptq.bits == 8:
            # code - 128 in two's complement is the code with its highest bit turned.
            qweight ^= np.uint32(0x80808080).view(np.int32)
        _transpose(qweight, codes.view(np.int32))

    step = max(1, _BLOCK_BYTES // (4 * N))
    part = Part(
        spec=spec,
        index=layer,
        key=f"{hashlib.sha256(about).hexdigest()[:16]}-{stamps}",
        in_bytes=sum(
            math.prod(weights.shape(name)) * weights.dtype(name).itemsize for name in names
        ),
        blocks=tuple(slice(i, min(i + step, words)) for i in range(0, words, step)),
        fill=fill,
    )
    return part, about


def check_zero_bias(weights: HfWeights, name: str) -> None:
    """A bias that the model does not have may only be there if it adds nothing."""
    if weights.read(name).any():
        raise InputError(
            f"{weights.folder}: {name} is not zero, and this layer of the original Qwen has no "
            "bias: the checkpoint is of another model"
        )


def _check_groups(
    g_idx: np.ndarray,  # int32 [K]
    module: str,
) -> None:
    plain = np.arange(g_idx.size, dtype=np.int32) // GROUP
    if not np.array_equal(g_idx, plain):
        at = int(np.argmax(g_idx != plain))
        raise InputError(
            f"{module}.g_idx puts input {at} into group {g_idx[at]}, expected {plain[at]}: the "
            "checkpoint was made with act-order, whose scattered groups the formats here do not "
            "hold; convert the unquantized model with --quantize"
        )


def _check_zeros(
    qzeros: np.ndarray,  # int32 [K/128, N*bits/32]
    module: str,
    gptq: Gptq,
) -> None:
    if (qzeros.view(np.uint8) != gptq.stored_zeros).any():
        raise InputError(
            f"{module}.qzeros has zero points other than {gptq.zero_point}: the checkpoint is not "
            "symmetric, and the formats here are; convert the unquantized model with --quantize"
        )


def _transpose(
    array: np.ndarray,  # [rows, columns]
    out: np.ndarray,  # [columns, rows]
) -> None:
    """A transpose by tiles of 16 rows, a cache line of `out`: 3 times as fast as one copy."""
    rows, columns = 16, 512
    for i in range(0, array.shape[0], rows):
        for j in range(0, array.shape[1], columns):
            out[j : j + columns, i : i + rows] = array[i : i + rows, j : j + columns].T
