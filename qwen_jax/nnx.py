"""The model as a Flax module, for those who work with flax.nnx; nothing else here needs it.

    loaded = qwen_jax.load("checkpoint", adapter="adapter")
    model = Qwen(loaded.config, loaded.params, loaded.lora, loaded.mesh)
    model(tokens)                                                      float32 [B, T, V]
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    nnx.grad(loss, argnums=wrt)(model, batch)                          the adapter alone

    base     the tree of params.py, an nnx.Param a leaf; a quantized leaf is one Param
    adapter  the tree of adapters.py, an nnx.LoRAParam a leaf; None without one

Weights that `load` packed for generation (bfloat16 on Hopper cards, without an adapter) it does not
take: read them with `checkpoint.load_params`. The arrays are shared with the trees that were given,
not copied. `nnx.LoRAParam` is a kind of `nnx.Param`: filter by `nnx.LoRAParam`, or by
`nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))`. It adds no computation of its own. The trainer does
not use it: plain trees need no filters, and calling a step on 80 layers costs 0.015 ms with them,
113 ms with a list of 80 Flax modules.
"""

from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from qwen_jax import model as decoder
from qwen_jax.adapters import Lora
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.packed_params import is_packed
from qwen_jax.quant import QTensor


class Qwen(nnx.Module):
    """A decoder whose weights are Flax variables."""

    def __init__(
        self,
        cfg: ModelConfig,
        params: decoder.Params,
        lora: Lora | None = None,
        mesh: Mesh | None = None,
    ):
        if is_packed(params):
            raise InputError(
                "the weights are packed for generation; give those of checkpoint.load_params"
            )
        self.cfg, self.mesh = cfg, mesh
        self.base = nnx.data(_variables(nnx.Param, params))
        self.adapter = nnx.data(None if lora is None else _variables(nnx.LoRAParam, lora.weights))
        self.scale = None if lora is None else lora.scale

    def __call__(
        self,
        tokens: jax.Array,  # int32 [B, T]
        lengths: jax.Array | None = None,  # int32 [B]; default T
    ) -> jax.Array:  # float32 [B, T, V]
        """All logits of whole sequences, as `api.Model.logits` gives them."""
        return decoder.logits(
            self.cfg, self.params, self.lora, tokens, lengths=lengths, mesh=self.mesh
        )

    @property
    def params(self) -> decoder.Params:
        """The base as plain arrays, for the functions of model.py."""
        return _values(self.base)

    @property
    def lora(self) -> Lora | None:
        """The adapter as plain arrays, for `save_peft` and the functions of model.py."""
        if self.adapter is None:
            return None
        return Lora(weights=_values(self.adapter), scale=self.scale)


def _variables(kind: type[nnx.Variable], tree: Any) -> Any:
    return jax.tree.map(kind, tree, is_leaf=lambda x: isinstance(x, QTensor))


def _values(tree: Any) -> Any:
    return jax.tree.map(
        lambda v: v.get_value(), tree, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
