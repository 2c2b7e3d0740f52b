"""The code of few rows' kernels, thread by thread: run on the host, against float64.

A wrong lane, address, slot of the ring or wait shows here; what a GPU would make of a missing barrier does
not.
"""

import ml_dtypes
import numpy as np
import pytest

from kimi_jax.int4 import dequantise_numpy
from kimi_jax.kernels.grouped_matmul import thin_by_column, thin_by_row
from tests.unit.kernels.ptx import Machine

LAYERS, LAYER, GROUPS, BLOCKS = 2, 1, 3, 1
OUT, IN = 384, 256  # three steps of one contraction, two of the other
SIZES = [11, 0, 21]  # more than one pass, none, and a pass that is not full
MODULES = {"by row": thin_by_row, "by column": thin_by_column}


def packed(codes):
    """int4 codes [..., in] as their bytes in memory, the first of two in the low half."""
    nibbles = codes.astype(np.uint8) & 15
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4


@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("order", MODULES)
def test_product(order, tiles):
    module, by_row = MODULES[order], order == "by row"
    rng = np.random.default_rng(tiles)
    codes = rng.integers(-8, 8, (LAYERS, GROUPS, OUT, IN)).astype(np.int8)
    scale = rng.uniform(0.01, 0.1, (LAYERS, GROUPS, OUT, IN // 32)).astype(ml_dtypes.bfloat16)
    contraction, features = (IN, OUT) if by_row else (OUT, IN)
    x = rng.normal(size=(sum(SIZES), contraction)).astype(ml_dtypes.bfloat16)
    y = np.full((sum(SIZES), features), 777, ml_dtypes.bfloat16)
    sizes, layer = np.array(SIZES, np.int32), np.array([LAYER], np.int32)
    scales = np.ascontiguousarray(scale.swapaxes(2, 3))
    machine = Machine([sizes, layer, x, packed(codes), scales, y])
    shape = module.plan(GROUPS, OUT, IN, tiles, BLOCKS)
    text = module.product(shape)
    for worker in range(shape.workers):
        machine.run(text, shape.memory, worker)
    plain = dequantise_numpy(codes[LAYER], scale[LAYER]).astype(np.float64)
    by_feature = plain if by_row else plain.swapaxes(1, 2)
    groups = np.split(x.astype(np.float64), np.cumsum(SIZES)[:-1])
    wanted = np.concatenate([rows @ by_feature[g].T for g, rows in enumerate(groups)])
    found = machine.array(5, y).astype(np.float64)
    assert np.linalg.norm(found - wanted) <= 4e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("order", MODULES)
@pytest.mark.parametrize(("out", "width_in"), [(256, 256), (4096, 7168), (7168, 2048), (256, 8192)])
def test_plans_fit_a_multiprocessor(order, tiles, out, width_in):
    """More shared memory would not launch; a ring longer than the contraction would not work."""
    shape = MODULES[order].plan(48, out, width_in, tiles, 132)
    assert shape.warpgroups * shape.memory <= 226 * 1024
    assert 2 <= shape.depth <= shape.steps
