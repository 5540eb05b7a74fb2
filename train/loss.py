"""Next-token cross entropy over a large vocabulary, without ever holding all logits.

    hidden [B, T, D] -> chunks of T -> logits float32 [B, C, V] -> sum of losses, trained tokens

At V = 152,064 the float32 logits of 2,048 tokens are 1.2 GB, and their gradient as much again; a
chunk of 512 tokens needs a quarter of it, and gives its part of the gradient at once. It knows
nothing of the layers, of LoRA or of the optimizer.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from qwen_jax.model import unembed
from qwen_jax.sharding import RULES, constrain, partition_spec

# Tokens whose logits are in memory at once, for each group of devices that shares its rows.
CHUNK_TOKENS = 512


def _chunk_length(B: int, T: int, mesh: Mesh | None) -> int:
    groups = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    return min(T, max(1, CHUNK_TOKENS * groups // B))


def next_token_loss(
    hidden: jax.Array,  # [B, T, D], after the final norm
    lm_head: jax.Array,  # [V, D], frozen
    tokens: jax.Array,  # int32 [B, T]
    loss_mask: jax.Array,  # bool [B, T]: token t is to be predicted (from t - 1)
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:  # float32 [], int32 []
    """Returns the summed cross entropy of the trained tokens, and how many they are.

    All of it in float32. Token 0 of a row has nothing before it and is never trained.
    """
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    mask = jnp.pad(loss_mask[:, 1:], ((0, 0), (0, 1)))
    with jax.named_scope("loss"):
        total = _summed_loss(mesh, hidden, lm_head, targets, mask)
    return total, jnp.sum(mask, dtype=jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed_loss(
    mesh: Mesh | None,
    hidden: jax.Array,  # [B, T, D]
    lm_head: jax.Array,  # [V, D]
    targets: jax.Array,  # int32 [B, T]
    mask: jax.Array,  # bool [B, T]
) -> jax.Array:  # float32 []
    return _scan_chunks(mesh, hidden, lm_head, targets, mask, with_gradient=False)[0]


def _forward(mesh, hidden, lm_head, targets, mask):
    # The gradient of a sum is known when its terms are: made here, from logits that are at hand,
    # it saves the third of the head's work that a backward pass would spend on making them again.
    return _scan_chunks(mesh, hidden, lm_head, targets, mask, with_gradient=True)


def _backward(mesh, gradient, g):
    return (gradient * g).astype(gradient.dtype), None, None, None


_summed_loss.defvjp(_forward, _backward)


def _scan_chunks(mesh, hidden, lm_head, targets, mask, with_gradient: bool):
    """The sum, and its gradient [B, T, D] in hidden's dtype if asked for."""
    B, T, D = hidden.shape
    length = _chunk_length(B, T, mesh)
    rest = -T % length

    def chunks(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [T/C, B, C, ...]
        x = jnp.pad(x, ((0, 0), (0, rest)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, length, *x.shape[2:]), 1, 0)

    def chunk_loss(total, chunk):
        h, target, trained = chunk  # [B, C, D], [B, C], [B, C]
        logits = unembed({"lm_head": lm_head}, h)
        if mesh is not None:
            # The head stays cut along V on its devices; the rows, far smaller, go to it.
            vocab = partition_spec(("vocab",), (lm_head.shape[0],), mesh)
            cut = vocab[0] if isinstance(vocab[0], tuple) else (vocab[0],)
            rows = tuple(axis for axis in RULES["batch"] if axis not in cut)
            logits = constrain(logits, mesh, PartitionSpec(rows, None, *vocab))
        # A masked sum, not a gather: V may be cut over devices.
        hit = jnp.arange(logits.shape[-1]) == target[..., None]
        picked = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        total += jnp.sum(jnp.where(trained, normalizer - picked, 0.0))
        if not with_gradient:
            return total, None
        slope = jnp.exp(logits - normalizer[..., None]) - hit
        slope = jnp.where(trained[..., None], slope, 0.0).astype(h.dtype)
        # In the compute dtype: a float32 product would copy the head to float32, 5 GB at 72B.
        dims = (((slope.ndim - 1,), (0,)), ((), ()))
        return total, jax.lax.dot_general(slope, lm_head, dims).astype(h.dtype)

    start = jnp.zeros((), jnp.float32)
    total, gradient = jax.lax.scan(
        chunk_loss, start, (chunks(hidden), chunks(targets), chunks(mask))
    )
    if with_gradient:
        gradient = jnp.moveaxis(gradient, 0, 1).reshape(B, -1, D)[:, :T]
    return total, gradient
