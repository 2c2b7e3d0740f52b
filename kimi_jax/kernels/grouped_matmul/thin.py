"""The product of few rows a group by packed int4 weights on Hopper: bound by the packed bytes.

One launch and no table: a warpgroup finds its rows from the group sizes. See `thin_code`.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Int

from kimi_jax.int4 import GROUP_SIZE
from kimi_jax.kernels.grouped_matmul import lanes, thin_by_column, thin_by_row
from kimi_jax.kernels.grouped_matmul.fragments import Order
from kimi_jax.kernels.grouped_matmul.pipeline import launch
from kimi_jax.kernels.grouped_matmul.thin_code import CONSTRAINTS, FEATURES, TILE, Shape
from kimi_jax.kernels.types import PackedWeight

BLOCKS = 132  # one for each multiprocessor
MOST_ROWS = 2 * TILE  # a group whose weights are read once


@partial(jax.jit, static_argnames=("order", "interpret"))
def multiply_few(
    x_AC: BFloat16[Array, "A C"],
    weight: PackedWeight,
    group_sizes_E: Int[Array, " E"],
    order: Order,
    layer: Int[Array, ""] | int = 0,
    interpret: bool = False,
) -> BFloat16[Array, "A features"]:
    """What `mosaic_kernel.multiply` computes, for groups of about 16 rows or fewer.

    Rows are passed over 16 at a time, 8 where there are no more than 4 in an average group. A group
    of more is right, and its weights are read again for each pass.

    Args:
        x_AC: rows sorted by group.
        weight: values [E, out, in] and scale [E, in/32, out], or both with a leading layers axis.
        group_sizes_E: int32, summing to A.
        order: BY_ROW contracts `in`, BY_COLUMN contracts `out`; both multiples of 128 from 256.
        layer: of a stacked weight; the stack is read in place.
        interpret: run on the CPU, with the work of a block done in plain JAX.
    """
    groups, out, width_in = weight.values.shape[-3:]
    tiles = 1 if x_AC.shape[0] <= TILE // 2 * groups else 2
    module = thin_by_row if order is Order.BY_ROW else thin_by_column
    shape = module.plan(groups, out, width_in, tiles, 2 if interpret else BLOCKS)
    plan = _Plan(shape, module.product, interpret)
    kernel = launch(
        f"grouped_int4_few_{order.value}",
        plan.run,
        jax.ShapeDtypeStruct((x_AC.shape[0], shape.features), jnp.bfloat16),
        shape.blocks,
        shape.warpgroups,
        {"memory": plgpu.SMEM((shape.warpgroups * shape.memory,), jnp.int8)},
        interpret,
        moved=groups * out * width_in / 2,
    )
    return kernel(
        group_sizes_E.astype(jnp.int32),
        jnp.asarray(layer, jnp.int32).reshape(1),
        x_AC,
        weight.values.reshape(-1, width_in),
        weight.scale.reshape(-1, out),
    )


@dataclass(frozen=True)
class _Plan:
    shape: Shape
    product: Callable[[Shape], str]
    interpret: bool

    def run(
        self, sizes: Any, layer: Any, x: Any, values: Any, scale: Any, y: Any, memory: Any
    ) -> None:
        """A warpgroup takes every so-manieth item: 128 features of one group."""
        first = lax.axis_index("block") * self.shape.warpgroups + lax.axis_index("warpgroup")
        refs = sizes, layer, x, values, scale, y
        if self.interpret:
            workers = jnp.int32(self.shape.workers)
            count = lax.div(self.shape.items - first + (workers - 1), workers)
            one = partial(self.plainly, *refs)
            lax.fori_loop(0, count, lambda n, _: one(first + n * workers), None)
            return

        @pl.when(first < self.shape.items)
        def _() -> None:
            self.by_lanes(first, *refs, memory)

    def by_lanes(self, first: Any, *refs: Any) -> None:
        """The code of `product`."""
        ref: Any = plgpu.RefType(())
        text = self.product(self.shape)
        # By its annotations, what it decorates keeps the context argument that callers leave out.
        inline: Any = plgpu.inline_mgpu

        @inline(arg_types=(ref,) * len(refs) + (plgpu.Layout.WG_SPLAT(()),), return_type=())
        def inlined(ctx: Any, *operands: Any) -> None:
            del ctx
            *in_global, shared, number = operands
            addresses = [lanes.global_pointer(ref) for ref in in_global]
            where = [lanes.shared_address(shared), number.registers.item(), lanes.Lane().thread]
            lanes.ptx_void([text], [*addresses, *where], CONSTRAINTS)

        inlined(*refs, first)

    def plainly(
        self, sizes: Any, layer: Any, x: Any, values: Any, scale: Any, y: Any, item: Any
    ) -> None:
        """An item in what the interpreter knows."""
        groups, out, width_in, by_row = astuple(self.shape)[:4]
        blocks = jnp.int32(self.shape.features // FEATURES)
        group, feature = lax.div(item, blocks), lax.rem(item, blocks) * FEATURES
        size = sizes[...]
        first = jnp.sum(jnp.where(jnp.arange(groups) < group, size, 0))
        of_all = layer[0] * groups + group
        weight = values[pl.ds(of_all * out, out)].astype(jnp.float32)
        scale_rows = width_in // GROUP_SIZE
        scales = scale[pl.ds(of_all * scale_rows, scale_rows)].astype(jnp.float32)
        decoded = (weight * jnp.repeat(scales.T, GROUP_SIZE, axis=1)).astype(jnp.bfloat16)
        mine = lax.dynamic_slice_in_dim(decoded if by_row else decoded.T, feature, FEATURES)

        def one(row: Any, _: None) -> None:
            sums = x[pl.ds(first + row, 1)].astype(jnp.float32) @ mine.astype(jnp.float32).T
            y[pl.ds(first + row, 1), pl.ds(feature, FEATURES)] = sums.astype(jnp.bfloat16)

        lax.fori_loop(0, jnp.sum(jnp.where(jnp.arange(groups) == group, size, 0)), one, None)
