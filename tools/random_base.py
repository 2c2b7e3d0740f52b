"""Random base weights made on the devices, for measuring a model that no disk here holds.

Each weight's values depend on the seed, its path, its layer and its expert, not on how it is spread:
one device and several hold the same model.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from kimi_jax.int4 import GROUP_SIZE
from kimi_jax.model.layout import BaseArray, base_arrays
from kimi_jax.model.params import weight_table
from kimi_jax.model.transformer import ModelDef
from kimi_jax.parallel.ranks import Ranks
from kimi_jax.parallel.sharding import local_shape

# Of int4 codes, drawn evenly. With -8 their mean would be half a code: all of a product's values would
# move together, more from layer to layer, until all tokens looked alike to the routers.
CODES = (-7, 7)
CODE_DEVIATION = 4.32


def random_base(model_def: ModelDef, seed: int = 0) -> dict[str, Any]:
    """The base tree of a model, each array in its place; of one rank alone, its part.

    Matrices keep the size of what they multiply, norms are 1, the router's correction is 0. What is added
    to the residual stream is smaller by the square root of how often that happens, as deep models
    begin training. Tokens stay as different as they are embedded, and are spread over the experts.
    """
    ranks = model_def.settings.ranks
    arrays = base_arrays(weight_table(model_def.config), ranks)
    added = (2 * model_def.config.num_hidden_layers) ** -0.5
    return {
        path: _made(arrays[path], ranks, seed, added if _adds(path) else 1.0)
        for path in model_def.base_shapes
    }


def factor_shapes(model_def: ModelDef) -> dict[str, tuple[int, ...]]:
    """Shapes of one rank's parts of the adapters' factors, by path."""
    shape_of_mesh = model_def.settings.ranks.mesh_shape
    return {
        path: local_shape(path, leaf.shape, model_def.adapter_specs[path], shape_of_mesh)
        for path, leaf in model_def.adapter_shapes.items()
    }


def _adds(path: str) -> bool:
    """Whether a weight's product is added to the residual stream."""
    return any(f".{name}." in f".{path}." for name in ("o_proj", "down_proj"))


def _made(array: BaseArray, ranks: Ranks, seed: int, size: float) -> Any:
    local = local_shape(array.path, array.shape, array.spec, ranks.mesh_shape)
    dtype = _dtype(array)
    key = jax.random.key(seed * 1_000_003 + zlib.crc32(array.path.encode()), impl="rbg")
    # One slice at a time: whole stacks of random bits would need more memory than the model.
    depth = 0 if not array.weight.stack else 2 if array.weight.role == "routed" else 1
    sliced = array.spec.index("expert") if "expert" in array.spec else None

    def make() -> Any:
        first = ranks.index() * local[sliced] if sliced is not None else 0
        if depth == 0:
            piece = _slice(array, key, array.shape, size).astype(dtype)
            return piece if sliced is None else jax.lax.dynamic_slice_in_dim(piece, first, local[0])

        def fill(number: Any, stack: Any) -> Any:
            if depth == 1:
                place = (number,)
                piece = _slice(array, jax.random.fold_in(key, number), array.shape[1:], size)
                if sliced is not None:
                    piece = jax.lax.dynamic_slice_in_dim(piece, first, local[1])
            else:
                layer, expert = number // local[1], number % local[1]
                place = (layer, expert)
                inner = jax.random.fold_in(jax.random.fold_in(key, layer), first + expert)
                piece = _slice(array, inner, array.shape[2:], size)
            start = (*place, *[0] * (len(local) - depth))
            piece = piece.astype(dtype).reshape(*[1] * depth, *local[depth:])
            return jax.lax.dynamic_update_slice(stack, piece, start)

        pieces = local[0] * (local[1] if depth == 2 else 1)
        return jax.lax.fori_loop(0, pieces, fill, jnp.zeros(local, dtype))

    return jax.jit(ranks.run(make, (), array.spec))()


def _dtype(array: BaseArray) -> Any:
    if array.leaf == "values":
        return jnp.int4
    return jnp.float32 if array.weight.storage == "fp32" else jnp.bfloat16


def _slice(array: BaseArray, key: Any, shape: tuple[int, ...], size: float) -> Any:
    weight = array.weight
    if array.leaf == "values":
        return jax.random.randint(key, shape, CODES[0], CODES[1] + 1, jnp.int8)
    if array.leaf == "scale":
        typical = size / (CODE_DEVIATION * (shape[0] * GROUP_SIZE) ** 0.5)
        return jax.random.uniform(key, shape, minval=0.5 * typical, maxval=1.5 * typical)
    if weight.role == "norm":
        return jnp.ones(shape)
    if len(shape) == 1:
        return jnp.zeros(shape)
    gain = 1.0 if weight.role == "embedding" else shape[-1] ** -0.5
    return size * gain * jax.random.normal(key, shape)
