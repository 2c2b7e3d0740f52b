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

WIDTH_STEP, WIDEST = 64, 192  # of a head


def attention(
    q_BTNH: Float[Array, "B T N qk"],
    k_BTNH: Float[Array, "B T N qk"],
    v_BTNU: Float[Array, "B T N U"],
    segment_ids_BT: Int[Array, "B T"],
    scale: float,
    interpret: bool = False,
) -> BFloat16[Array, "B T N U"]:
    """Causal attention within contiguous segments; see `kimi_jax.kernels.api.attention`.

    Args:
        q_BTNH: bf16 queries.
        k_BTNH: keys.
        v_BTNU: values, which may be narrower.
        segment_ids_BT: a segment is a run of equal ids; of a run of zeros, each token sees itself.
        scale: of the scores, more than 0.
        interpret: run on the CPU.

    Raises:
        UserError: operands that the kernels do not take.
    """
    if problem := problem_of(q_BTNH, v_BTNU):
        raise UserError(f"impl is 'pallas', but {problem}. Use impl='reference'")
    missing = -q_BTNH.shape[1] % TILE
    q, k, v, ids = q_BTNH, k_BTNH, v_BTNU, segment_ids_BT
    if missing:
        q, k, v = (jnp.pad(r, ((0, 0), (0, missing), (0, 0), (0, 0))) for r in (q, k, v))
        ids = jnp.pad(ids, ((0, 0), (0, missing)))
    out = residuals.attention(Mosaic(interpret), q, k, v, ids, float(scale))
    return out[:, : q_BTNH.shape[1]]


def problem_of(q: Float[Array, "B T N qk"], v: Float[Array, "B T N U"]) -> str | None:
    """What the kernels do not take about these operands, and what they do."""
    if q.dtype != jnp.bfloat16:
        return f"the queries are {q.dtype}; required: bfloat16"
    key, value = q.shape[-1], v.shape[-1]
    fits = key % WIDTH_STEP == value % WIDTH_STEP == 0 and value <= key <= WIDEST
    if not fits or (ROWS * key) % value:
        return (
            f"the queries are {key} and the values {value} wide; required: multiples of "
            f"{WIDTH_STEP} up to {WIDEST}, values not wider than queries"
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

    def plan(self, q: Array, v: Array, scale: float) -> Plan:
        """What the kernels' code is specialised for."""
        batch, length, heads, key_width = q.shape
        return Plan(batch, length, heads, key_width, v.shape[-1], scale, self.interpret)

    def forward(
        self, q: Array, k: Array, v: Array, segment_ids: Array, scale: float
    ) -> tuple[Array, Array]:
        """Output and logarithms of the denominators."""
        return forward(self.plan(q, v, scale), q, k, v, runs(segment_ids)[0])

    def backward(
        self,
        saved: tuple[Array, Array, Array, Array, Array, Array],
        d_out: Array,
        scale: float,
    ) -> residuals.Gradients:
        """Gradients of queries, keys and values."""
        q, k, v, segment_ids, out, logsumexp = saved
        first, last = runs(segment_ids)
        mean = jnp.einsum("btnu,btnu->bnt", out, d_out, preferred_element_type=jnp.float32)
        # Nothing flows back from padding: its probabilities become 0.
        real = (segment_ids > 0)[:, None]
        starts = jnp.where(real, -logsumexp / scale, MASKED), -mean
        plan = self.plan(q, v, scale)
        dq = query_gradient(plan, q, k, v, d_out, *starts, first)
        dk, dv = key_gradient(plan, q, k, v, d_out, *starts, last)
        return residuals.Gradients(dq, dk, dv)
