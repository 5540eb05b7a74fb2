"""Next-token cross entropy over a large vocabulary, without ever holding all logits.

    hidden [B, T, D] -> chunks of T -> logits float32 [B, C, V] -> sum of losses, trained tokens

At V = 152,064 the float32 logits of 2,048 tokens are 1.2 GB, and their gradient as much again; a
chunk of 512 tokens needs a quarter of it, and is made again in the backward pass. It knows nothing
of the layers, of LoRA or of the optimizer.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from qwen_jax.model import unembed
from qwen_jax.sharding import constrain, partition_spec

# Tokens whose logits are in memory at once, for each group of devices that shares its rows.
CHUNK_TOKENS = 512


@jax.custom_vjp
def frozen_logits(
    hidden: jax.Array,  # [..., D]
    head: jax.Array,  # [V, D]
) -> jax.Array:  # float32 [..., V]
    """The logits, with a backward pass in the compute dtype.

    The derived one would multiply float32 with `head` and so copy it to float32: 5 GB at 72B.
    """
    return unembed({"lm_head": head}, hidden)


def _forward(hidden, head):
    # An empty slice of hidden carries its dtype to the backward pass.
    return frozen_logits(hidden, head), (head, hidden[..., :0])


def _backward(kept, g):
    head, like = kept
    dims = (((g.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(g.astype(like.dtype), head, dims).astype(like.dtype), None


frozen_logits.defvjp(_forward, _backward)


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
    B, T = tokens.shape
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    mask = jnp.pad(loss_mask[:, 1:], ((0, 0), (0, 1)))
    length = _chunk_length(B, T, mesh)
    rest = -T % length

    def chunks(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [T/C, B, C, ...]
        x = jnp.pad(x, ((0, 0), (0, rest)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, length, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def chunk_loss(total, chunk):
        h, target, trained = chunk  # [B, C, D], [B, C], [B, C]
        logits = frozen_logits(h, lm_head)
        if mesh is not None:
            # The head stays cut along V on its devices; the rows, far smaller, go to it.
            vocab = partition_spec(("vocab",), (lm_head.shape[0],), mesh)
            logits = constrain(logits, mesh, PartitionSpec("data", None, *vocab))
        # A masked sum, not a gather: V may be cut over devices.
        hit = jnp.arange(logits.shape[-1]) == target[..., None]
        picked = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        loss = jax.nn.logsumexp(logits, axis=-1) - picked
        return total + jnp.sum(jnp.where(trained, loss, 0.0)), None

    with jax.named_scope("loss"):
        start = jnp.zeros((), jnp.float32)
        total, _ = jax.lax.scan(chunk_loss, start, (chunks(hidden), chunks(targets), chunks(mask)))
    return total, jnp.sum(mask, dtype=jnp.int32)
