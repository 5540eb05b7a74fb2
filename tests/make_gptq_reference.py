"""Makes tests/data/auto_gptq_reference.npz with AutoGPTQ's own packing and unpacking.

    python -m tests.make_gptq_reference qlinear_cuda_old.py

The argument is auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py of auto-gptq 0.7.1 (a wheel is a
zip file); its torch code runs on a CPU and needs nothing else of that package, which no longer
imports beside a current transformers. The official Qwen Int4 and Int8 files were made with it.
"""

import importlib.util
import pathlib
import sys

import numpy as np
import torch

K, N, GROUP = 256, 32, 128


def main() -> None:
    spec = importlib.util.spec_from_file_location("qlinear_cuda_old", sys.argv[1])
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    torch.manual_seed(0)
    tensors = {}
    for bits in (4, 8):
        zero = 2 ** (bits - 1)
        codes = torch.randint(0, 2**bits, (N, K))
        codes[0, :2] = torch.tensor([0, 2**bits - 1])
        scales = (torch.rand(N, K // GROUP) * 0.01 + 0.001).half().float()
        linear = torch.nn.Linear(K, N)
        linear.weight.data = (codes - zero) * scales.repeat_interleave(GROUP, dim=1)
        layer = library.QuantLinear(bits, GROUP, K, N, True)
        layer.pack(linear, scales, torch.full_like(scales, zero), None)
        # Unpacked by the library's forward pass, in float32 so that the product is exact.
        layer.scales, layer.bias = layer.scales.float(), torch.zeros(N)
        tensors[f"int{bits}.weight"] = layer(torch.eye(K)).T.contiguous()
        tensors[f"int{bits}.scales"] = layer.scales.half()
        for name in ("qweight", "qzeros", "g_idx"):
            tensors[f"int{bits}.{name}"] = getattr(layer, name)
    path = pathlib.Path(__file__).parent / "data" / "auto_gptq_reference.npz"
    np.savez_compressed(path, **{name: tensor.numpy() for name, tensor in tensors.items()})


if __name__ == "__main__":
    main()
