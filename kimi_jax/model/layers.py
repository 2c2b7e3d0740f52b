"""Building blocks: frozen weights, norms, and linear layers that may carry an adapter.

Modules hold either the weights of one layer or, with a leading dimension, of a whole stack; the
equations are those of one layer, applied inside a scan over the stack.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from kimi_jax.kernels import api as kernels
from kimi_jax.kernels.types import GroupedAdapter, GroupedWeight, LinearAdapter, PackedWeight
from kimi_jax.lora import Adapter, AdapterPlan
from kimi_jax.model.kept import STATISTICS
from kimi_jax.model.layout import in_parts
from kimi_jax.model.params import Weight, scale_shape
from kimi_jax.parallel.ranks import Ranks

DTYPES = {"bf16": jnp.bfloat16, "fp32": jnp.float32}


class Base(nnx.Variable):
    """A weight of the base model: imported, frozen, never differentiated."""


class Stacked(Base):
    """A base weight whose layers stay in their stack: kernels read the one they are told, in place."""


def declare(weight: Weight, kind: type[Base] = Base) -> Base:
    """The place of a weight that is stored as one floating array; its value comes later."""
    return kind(jax.ShapeDtypeStruct(weight.stacked_shape, DTYPES[weight.storage]))


class Norm(nnx.Module):
    """RMSNorm: statistics in fp32, cast back, then times the weight, in HF's order of casts."""

    def __init__(self, weight: Weight, eps: float) -> None:
        self.weight = declare(weight)
        self.eps = eps

    def __call__(self, x: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
        """x / rms(x) · weight."""
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        inverse_rms = jax.lax.rsqrt(checkpoint_name(mean_square, STATISTICS) + self.eps)
        return self.weight[...].astype(x.dtype) * (x32 * inverse_rms).astype(x.dtype)


class _Adapted(nnx.Module):
    """The adapter of a linear weight, absent when the plan does not name it."""

    lora_A: nnx.LoRAParam | None
    lora_B: nnx.LoRAParam | None

    def _declare_adapter(self, adapter: Adapter | None) -> None:
        shapes = adapter.shapes() if adapter else {}
        place = {
            name: nnx.LoRAParam(jax.ShapeDtypeStruct(s, jnp.float32)) for name, s in shapes.items()
        }
        self.lora_A = nnx.data(place.get("lora_A"))
        self.lora_B = nnx.data(place.get("lora_B"))
        self.scale_of_adapter = adapter.scale if adapter else 0.0


class Linear(_Adapted):
    """y = x · Wᵀ + alpha/rank · (x · Aᵀ) · Bᵀ, with W [out, in]."""

    def __init__(self, weight: Weight, plan: AdapterPlan, ranks: Ranks) -> None:
        self.weight = declare(weight)
        self.ranks = ranks
        self.in_parts = in_parts(weight, ranks)
        self._declare_adapter(plan.get(weight.path))

    @property
    def whole_weight(self) -> Float[Array, "out in"]:
        """The weight with all its rows, gathered if every rank keeps a part of them."""
        weight = self.weight[...]
        return self.ranks.gather_weight(weight) if self.in_parts else weight

    def __call__(self, x: Float[Array, "*tokens in"]) -> Float[Array, "*tokens out"]:
        """Activation dtype in and out."""
        return together(x, self)[0]

    @property
    def adapter(self) -> LinearAdapter | None:
        """The adapter's factors, if there is one."""
        if self.lora_A is None or self.lora_B is None:
            return None
        return LinearAdapter(self.lora_A[...], self.lora_B[...], self.scale_of_adapter)

    def merged(self, dtype: jnp.dtype) -> Float[Array, "out in"]:
        """W + alpha/rank · B · A, for uses that need the matrix itself (the absorbed form of MLA)."""
        weight = self.whole_weight.astype(dtype)
        if (adapter := self.adapter) is not None:
            delta = adapter.scale * jnp.einsum("or,ri->oi", adapter.b, adapter.a)
            weight = (weight.astype(jnp.float32) + delta).astype(dtype)
        return weight


class ExpertLinear(_Adapted):
    """The same projection of a rank's routed experts, packed int4 or bf16, in all layers of the stack."""

    def __init__(self, weight: Weight, plan: AdapterPlan) -> None:
        packed = weight.storage == "int4"
        shape = weight.stacked_shape
        self.values = Stacked(jax.ShapeDtypeStruct(shape, jnp.int4)) if packed else None
        self.scale = (
            Stacked(jax.ShapeDtypeStruct(scale_shape(shape), jnp.bfloat16)) if packed else None
        )
        self.weight = None if packed else declare(weight, Stacked)
        self._declare_adapter(plan.get(weight.path))

    @property
    def grouped_weight(self) -> GroupedWeight:
        """The weights of all layers as the kernels take them."""
        if self.values is not None and self.scale is not None:
            return PackedWeight(self.values[...], self.scale[...])
        assert self.weight is not None
        return self.weight[...]

    @property
    def adapter(self) -> GroupedAdapter | None:
        """The factors of the adapters of one layer, if there are any."""
        if self.lora_A is None or self.lora_B is None:
            return None
        return GroupedAdapter(self.lora_A[...], self.lora_B[...], self.scale_of_adapter)


def together(
    x: Float[Array, "*tokens in"], *layers: Linear
) -> tuple[Float[Array, "*tokens _"], ...]:
    """Several linear layers of the same rows, whose gradient of the rows is then one product or few."""
    weights = tuple(layer.whole_weight for layer in layers)
    return kernels.linear(x, weights, tuple(layer.adapter for layer in layers))
