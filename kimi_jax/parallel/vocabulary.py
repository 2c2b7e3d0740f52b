"""The embedding and the head, whose rows are spread over ranks by vocabulary."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kimi_jax.kernels import api as kernels
from kimi_jax.kernels.types import LinearAdapter
from kimi_jax.parallel.mesh import EXPERT
from kimi_jax.parallel.ranks import Ranks


def look_up(
    ranks: Ranks, table_VD: Float[Array, "V D"], ids_N: Int[Array, " rows"], dtype: jnp.dtype
) -> Float[Array, "rows D"]:
    """Embeddings of this rank's ids; `table_VD` is its part of the table.

    Each id's row comes from the one rank that has it; the sum over ranks has one term that is not 0.
    """
    if ranks.expert == 1:
        return table_VD[ids_N].astype(dtype)
    gathered = ranks.gather_rows(ids_N)
    part = ranks.index()
    if ranks.alone:
        # The n-th copy of the rows is looked up as by the n-th rank, so that each id is found once. A
        # row of zeros would not do: a norm multiplies its gradient by 1/√eps, layer upon layer.
        part = jnp.arange(gathered.shape[0]) // ids_N.shape[0]
    here = gathered - part * table_VD.shape[0]
    ours = (here >= 0) & (here < table_VD.shape[0])
    rows = jnp.where(ours[:, None], table_VD[jnp.where(ours, here, 0)].astype(dtype), 0)
    return ranks.return_rows(rows)


def cross_entropy(
    ranks: Ranks,
    hidden_TD: Float[Array, "T D"],
    weight_VD: Float[Array, "V D"],
    targets_T: Int[Array, " T"],
    loss_weights_T: Float[Array, " T"],
    adapter: LinearAdapter | None,
    chunk: int,
) -> Float[Array, ""]:
    """The loss of this rank's tokens, each rank computing the logits of its part of the vocabulary.

    See `kimi_jax.kernels.api.linear_cross_entropy`. `chunk` counts this rank's tokens: as many of every
    rank's are met at a time, with a part of the vocabulary, which is as much memory as on one device.
    """
    split = None
    if ranks.expert > 1:
        if ranks.alone:  # the shapes of the exchange, on one device
            hidden_TD, loss_weights_T = ranks.gather(hidden_TD), ranks.gather(loss_weights_T)
            targets_T, chunk = ranks.gather(targets_T) % weight_VD.shape[0], chunk * ranks.expert
        else:
            split = kernels.VocabularySplit(
                EXPERT, ranks.index() * weight_VD.shape[0], own_tokens=True
            )
    return kernels.linear_cross_entropy(
        hidden_TD, weight_VD, targets_T, loss_weights_T, adapter, chunk=chunk, split=split
    )
