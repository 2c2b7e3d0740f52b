"""Operands of the kernels that are more than one array."""

from typing import NamedTuple

from jaxtyping import Array, BFloat16, Float, Int4


class PackedWeight(NamedTuple):
    """int4 weights of groups: values [E, out, in] and bf16 scales [E, in/32, out].

    Or of all layers: both with a leading dimension of layers.
    """

    values: Int4[Array, "*layers E out in"]
    scale: BFloat16[Array, "*layers E groups out"]


GroupedWeight = PackedWeight | Float[Array, "*layers E out in"]


class GroupedAdapter(NamedTuple):
    """Adapter factors of groups, fp32; a factor without a group dimension is shared by all groups.

    a: [E, rank, in] or [rank, in]. b: [E, out, rank] or [out, rank]. scale: alpha / rank.
    """

    a: Float[Array, "..."]
    b: Float[Array, "..."]
    scale: float


class LinearAdapter(NamedTuple):
    """Adapter factors of one weight, fp32: a [rank, in], b [out, rank]; scale alpha / rank."""

    a: Float[Array, "r in"]
    b: Float[Array, "out r"]
    scale: float
