"""The Python face of the project: `qwen_jax.load(checkpoint)` gives a Model to call.

    model = qwen_jax.load("checkpoint", adapter=None, mesh="8")
    model.logits([[1, 2, 3]])                                   float32 [B, T, V]
    model.generate([1, 2, 3], SamplingParams(greedy=True))      token ids

It puts checkpoint, adapter, mesh, tokenizer and engine together and computes nothing itself.
"""

import functools
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwen_jax import chatml, generation_config, packed
from qwen_jax import model as decoder
from qwen_jax.adapters import Lora, load_peft
from qwen_jax.cache import stored_dtype
from qwen_jax.checkpoint import load_params
from qwen_jax.config import ModelConfig
from qwen_jax.engine import Engine, check_ids, padded_rows
from qwen_jax.errors import InputError
from qwen_jax.generation_config import GenerationDefaults
from qwen_jax.manifest import DTYPES, Manifest, load_manifest
from qwen_jax.params import abstract_params
from qwen_jax.sampling import SamplingParams
from qwen_jax.sharding import check_tensor_axis, make_mesh, parse_mesh
from qwen_jax.tokenizer import RANKS_FILE, Tokenizer


def load(
    path: str | os.PathLike,
    adapter: str | os.PathLike | None = None,
    mesh: str | int | Mapping[str, int] | None = None,
    dtype: Any = None,
    *,
    cache_dtype: Any = None,
    drafts: int = 0,
    int8_head: bool = False,
) -> "Model":
    """Loads a converted checkpoint, and a PEFT adapter on top of it if one is named.

    `mesh`: None for one device, a number of devices ("8"), sizes ("fsdp=2,tensor=4") or a dict of
    them (see `mesh_sizes`). `dtype` overrides the compute dtype of the checkpoint; `cache_dtype`
    "int8" halves the memory of keys and values. `drafts` and `int8_head`: see Engine and
    packed.pack_params. Raises InputError if anything is missing or does not fit together.
    """
    path = pathlib.Path(path)
    manifest = load_manifest(path)
    if dtype is not None and getattr(dtype, "__name__", str(dtype)) not in DTYPES:
        # float16 overflows in this model; integers are no compute dtype.
        raise InputError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    dtype = manifest.dtype if dtype is None else dtype
    cache_dtype = stored_dtype(cache_dtype, dtype)
    defaults, warnings = generation_config.load(path)
    device_mesh = None
    if mesh is not None and mesh != "":
        device_mesh = make_mesh(mesh_sizes(mesh, manifest.config))
    lora = None
    if adapter is not None:  # before the weights: a wrong adapter should fail at once
        lora, _ = load_peft(
            pathlib.Path(adapter),
            manifest.config,
            fingerprint=manifest.fingerprint,
            mesh=device_mesh,
        )
    if int8_head:
        planned = abstract_params(manifest.config, jnp.dtype(dtype), manifest.quantization)
        if not packed.pays(planned, lora, device_mesh):
            raise InputError(
                "int8_head is for weights that are packed for Hopper cards (computing in bfloat16, "
                "without an adapter), and these are not; leave it out"
            )
        packed.check_packing(planned, int8_head=True, mesh=device_mesh)
    manifest, params = load_params(path, mesh=device_mesh, dtype=dtype)
    if packed.pays(params, lora, device_mesh):
        params = packed.pack_params(params, consume=True, int8_head=int8_head, mesh=device_mesh)
    return Model(path, manifest, params, lora, device_mesh, defaults, warnings, cache_dtype, drafts)


def mesh_sizes(mesh: str | int | Mapping[str, int], cfg: ModelConfig) -> dict[str, int]:
    """The size of every mesh axis for inference.

    A bare number goes to `tensor` as far as heads and FFN columns divide, the rest to `fsdp`.
    A tensor size that is named must divide both: InputError.
    """
    if isinstance(mesh, Mapping):
        mesh = ",".join(f"{axis}={size}" for axis, size in mesh.items())
    text = str(mesh)
    sizes = parse_mesh(text, bare_axis="tensor")
    tensor = sizes["tensor"]
    if text.strip().isdigit():
        split = math.gcd(tensor, cfg.num_heads, cfg.ffn_size)
        return sizes | {"tensor": split, "fsdp": tensor // split}
    check_tensor_axis(sizes, {"heads": cfg.num_heads, "FFN columns": cfg.ffn_size})
    return sizes


class Model:
    """A loaded checkpoint: weights on their devices and all that belongs to them.

    manifest, config, params, lora, mesh   what was loaded, and where it lies
    defaults, warnings                     generation_config.json and what is doubtful in it
    cache_dtype, drafts                    how `engine` is made, on first use (see Engine)
    """

    def __init__(
        self,
        path: pathlib.Path,
        manifest: Manifest,
        params: decoder.Params,
        lora: Lora | None,
        mesh: Mesh | None,
        defaults: GenerationDefaults,
        warnings: list[str],
        cache_dtype: Any = None,
        drafts: int = 0,
    ):
        self.path, self.manifest, self.params, self.lora = path, manifest, params, lora
        self.mesh, self.defaults, self.warnings = mesh, defaults, warnings
        self.cache_dtype, self.drafts = cache_dtype, drafts

    @property
    def config(self) -> ModelConfig:
        return self.manifest.config

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Read on first use; InputError if the checkpoint has none or that of another model."""
        if not (self.path / RANKS_FILE).is_file():
            raise InputError(
                f"{self.path} has no {RANKS_FILE}: text needs a tokenizer; copy the file that is "
                "published with the model into the checkpoint, or work with token ids"
            )
        return Tokenizer.from_dir(self.path, self.config.vocab_size)

    @functools.cached_property
    def engine(self) -> Engine:
        """Without a tokenizer any row of the vocabulary can be drawn."""
        n_vocab, stops = None, self.defaults.stop_ids
        if (self.path / RANKS_FILE).is_file():
            n_vocab = self.tokenizer.n_vocab
            stops |= chatml.stop_ids(self.tokenizer)
        return Engine(
            self.config, self.params, self.lora, self.mesh, n_vocab, stops,
            cache_dtype=self.cache_dtype, drafts=self.drafts,
        )  # fmt: skip

    def logits(self, ids: Sequence[Sequence[int]] | np.ndarray) -> jax.Array:
        """All logits float32 [B, T, V] of token ids [B, T]; padded vocabulary rows are in it."""
        rows = [
            check_ids(row, self.config.vocab_size, f"row {number}")
            for number, row in enumerate(ids, start=1)
        ]
        lengths = sorted({len(row) for row in rows})
        if len(lengths) != 1:
            raise InputError(f"rows of ids have lengths {lengths}; expected [B, T], all one length")
        B = len(rows)
        rows += [rows[0]] * (padded_rows(B, self.mesh) - B)
        tokens = jnp.asarray(np.stack(rows))
        if packed.is_packed(self.params):
            return packed.logits(self.config, self.params, tokens, mesh=self.mesh)[:B]
        return decoder.logits(self.config, self.params, self.lora, tokens, mesh=self.mesh)[:B]

    def generate(
        self,
        ids: Sequence[int] | Sequence[Sequence[int]] | np.ndarray,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[int] | list[list[int]]:
        """Continues one prompt of ids, or each of several; default: generation_config.json."""
        params = self.defaults.sampling_params() if params is None else params
        if len(ids) and np.ndim(ids[0]) == 0:
            return self.engine.generate([ids], params)[0]
        return self.engine.generate(ids, params)
