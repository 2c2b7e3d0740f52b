"""Attention of rows packed with segments on Hopper, by this package's own kernels.

Each pass walks only those tiles in which somebody sees somebody. All sums have a fixed order: the
same operands give the same bits.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int

from kimi_jax.errors import UserError
from kimi_jax.kernels.mla_attention import residuals
from kimi_jax.kernels.mla_attention.mosaic_common import MASKED, ROWS, TILE, Plan
from kimi_jax.kernels.mla_attention.mosaic_forward import forward
from kimi_jax.kernels.mla_attention.mosaic_key_gradient import key_gradient
from kimi_jax.kernels.mla_attention.mosaic_query_gradient import query_gradient
from kimi_jax.kernels.mla_attention.reference import widths

WIDTH_STEP, WIDEST = 64, 192  # of a head


def attention(
    q_BTNH: Float[Array, "B T N qk"],
    kv_BTNH: Float[Array, "B T N kv"],
    rope_key_BTR: Float[Array, "B T R"],
    segment_ids_BT: Int[Array, "B T"],
    scale: float,
    interpret: bool = False,
) -> BFloat16[Array, "B T N U"]:
    """Causal attention within contiguous segments; see `kimi_jax.kernels.api.latent_attention`.

    Args:
        q_BTNH: bf16 queries.
        kv_BTNH: keys without position, then values.
        rope_key_BTR: the rotated part of the keys, one for all heads.
        segment_ids_BT: a segment is a run of equal ids; of a run of zeros, each token sees itself.
        scale: of the scores, more than 0.
        interpret: run on the CPU.

    Raises:
        UserError: operands that the kernels do not take.
    """
    if problem := problem_of(q_BTNH, kv_BTNH, rope_key_BTR):
        raise UserError(f"impl is 'pallas', but {problem}. Use impl='reference'")
    missing = -q_BTNH.shape[1] % TILE
    arrays = q_BTNH, kv_BTNH, rope_key_BTR, segment_ids_BT
    if missing:
        arrays = [jnp.pad(a, ((0, 0), (0, missing), *[(0, 0)] * (a.ndim - 2))) for a in arrays]
    *operands, ids = arrays
    out = residuals.attention(Mosaic(interpret), tuple(operands), ids, float(scale))
    return out[:, : q_BTNH.shape[1]]


def problem_of(
    q: Float[Array, "B T N qk"], kv: Float[Array, "B T N kv"], rope_key: Float[Array, "B T R"]
) -> str | None:
    """What the kernels do not take about these operands, and what they do."""
    for name, operand in (("queries", q), ("keys and values", kv), ("rotated keys", rope_key)):
        if operand.dtype != jnp.bfloat16:
            return f"the {name} are {operand.dtype}; required: bfloat16"
    nope, rope, value = widths(q, kv, rope_key)
    key = nope + rope
    steps = all(width > 0 and width % WIDTH_STEP == 0 for width in (nope, rope, value))
    if not steps or not value <= key <= WIDEST or (ROWS * key) % value:
        return (
            f"the queries are {nope} + {rope} and the values {value} wide; required: multiples of "
            f"{WIDTH_STEP} up to {WIDEST} together, values not wider than queries"
        )
    return None


def runs(segment_ids_BT: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The first and the last place of the run of equal ids in which each token stands.

    A token of segment 0 is a run of its own: there is nothing to see in padding.
    """
    place = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)[None]
    same = (segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1]) & (segment_ids_BT[:, 1:] > 0)
    begins = jnp.pad(~same, ((0, 0), (1, 0)), constant_values=True)
    ends = jnp.pad(~same, ((0, 0), (0, 1)), constant_values=True)
    first = lax.cummax(jnp.where(begins, place, 0), axis=1)
    last = lax.cummin(jnp.where(ends, place, place.shape[1]), axis=1, reverse=True)
    return first, last


@dataclass(frozen=True)
class Mosaic:
    """Both passes; see `residuals.AttentionKernel`."""

    interpret: bool = False

    def plan(self, operands: tuple[Array, ...], scale: float) -> Plan:
        """What the kernels' code is specialised for."""
        q, kv, rope_key = operands
        batch, length, heads, _ = q.shape
        nope, rope, value = widths(q, kv, rope_key)
        return Plan(batch, length, heads, nope, rope, value, scale, self.interpret)

    def forward(
        self, operands: tuple[Array, ...], segment_ids: Array, scale: float
    ) -> tuple[Array, Array]:
        """Output and logarithms of the denominators."""
        q, kv, rope_key = operands
        return forward(self.plan(operands, scale), q, kv, rope_key, runs(segment_ids)[0])

    def backward(
        self, saved: residuals.Saved, d_out: Array, scale: float
    ) -> tuple[Array, Array, Array]:
        """Gradients of queries, of keys and values, and of the shared key."""
        (q, kv, rope_key), segment_ids, out, logsumexp = saved
        first, last = runs(segment_ids)
        mean = jnp.einsum("btnu,btnu->bnt", out, d_out, preferred_element_type=jnp.float32)
        # Nothing flows back from padding: its probabilities become 0.
        real = (segment_ids > 0)[:, None]
        starts = jnp.where(real, -logsumexp / scale, MASKED), -mean
        plan = self.plan(saved.operands, scale)
        dq = query_gradient(plan, q, kv, rope_key, d_out, *starts, first)
        d_kv, d_rope_BNTR = key_gradient(plan, q, kv, rope_key, d_out, *starts, last)
        d_rope = d_rope_BNTR.astype(jnp.float32).sum(1).astype(jnp.bfloat16)
        return dq, d_kv, d_rope
