"""Attention of rows of one segment by cuDNN, through the operation that XLA has for it.

`jax.nn.dot_product_attention` refuses values narrower than keys. XLA's own custom call behind it
takes them; it is reached here by the public `jax.ffi`. Its form for several segments a row is left
alone: it uses one table of offsets for keys and values, which is wrong where their widths differ
and ends the process's CUDA context.
"""

import json
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kimi_jax.errors import UserError
from kimi_jax.kernels.mla_attention import residuals
from kimi_jax.kernels.mla_attention.reference import keys_and_values, widths

FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
WIDEST, WIDTH_STEP = 256, 8  # of a head, on Hopper
DTYPES = {jnp.dtype(jnp.bfloat16): "BF16", jnp.dtype(jnp.float16): "F16"}

# Contracted and batch dimensions of the attention's products, in the order of rows [B, T, N, width]
# and of scores [B, N, T, S], by their names in XLA's configuration of the operation.
FORWARD_PRODUCTS = {
    "bmm1": (3, 3, (0, 2), (0, 2)),  # scores = q · k
    "bmm2": (3, 1, (0, 1), (0, 2)),  # out = probabilities · v
}
BACKWARD_PRODUCTS = {
    "bmm1_grad_gemm1": (2, 1, (0, 1), (0, 2)),  # dk = d_scores · q
    "bmm1_grad_gemm2": (3, 1, (0, 1), (0, 2)),  # dq = d_scores · k
    "bmm2_grad_gemm1": (2, 1, (0, 1), (0, 2)),  # dv = probabilities · d_out
    "bmm2_grad_gemm2": (3, 3, (0, 2), (0, 2)),  # d_probabilities = d_out · v
}


def attention(
    q_BTNH: Float[Array, "B T N qk"],
    kv_BTNH: Float[Array, "B T N kv"],
    rope_key_BTR: Float[Array, "B T R"],
    segment_ids_BT: Int[Array, "B T"],
    scale: float,
    deterministic: bool = False,
) -> Float[Array, "B T N U"]:
    """Causal attention of rows that hold one segment, and then perhaps padding (segment 0).

    Segment ids are not looked at, but that no gradient flows back from padding. What padding puts
    out is finite and means nothing. cuDNN takes whole keys, and values apart from them: both are
    copied together first. See `kimi_jax.kernels.api.latent_attention`.

    Args:
        q_BTNH: bf16 or fp16 queries.
        kv_BTNH: keys without position, then values.
        rope_key_BTR: the rotated part of the keys, one for all heads.
        segment_ids_BT: see above.
        scale: of the scores.
        deterministic: ask cuDNN for a backward pass that gives the same bits each time.

    Raises:
        UserError: operands that cuDNN does not take.
    """
    nope, _, _ = widths(q_BTNH, kv_BTNH, rope_key_BTR)
    k_BTNH, v_BTNU = keys_and_values(kv_BTNH, rope_key_BTR, nope)
    _check(q_BTNH, v_BTNU)
    operands = q_BTNH, k_BTNH, v_BTNU
    return residuals.attention(Cudnn(deterministic), operands, segment_ids_BT, scale)


def _check(q: Array, v: Array) -> None:
    """Raises UserError for what cuDNN's attention does not take."""
    if q.dtype not in DTYPES:
        raise UserError(
            f"impl is 'cudnn' and the queries are {q.dtype}; required: bfloat16 or float16. "
            "Use impl='reference' for other precisions"
        )
    for name, width in (("queries and keys", q.shape[-1]), ("values", v.shape[-1])):
        if width % WIDTH_STEP or width > WIDEST:
            raise UserError(
                f"impl is 'cudnn' and the {name} are {width} wide; required: a multiple of "
                f"{WIDTH_STEP}, at most {WIDEST}. Use impl='reference' for other widths"
            )


@dataclass(frozen=True)
class Cudnn:
    """Both passes; see `residuals.AttentionKernel`."""

    deterministic: bool = False

    def forward(
        self, operands: tuple[Array, ...], segment_ids: Array, scale: float
    ) -> tuple[Array, Array]:
        """Output and logarithms of the denominators."""
        del segment_ids
        q, k, v = operands
        batch, length, heads, _ = q.shape
        out, logsumexp, _ = self._call(
            FORWARD,
            _configuration(q, scale, FORWARD_PRODUCTS),
            (q, k, v),
            [_by_head(v), jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)],
            transposed=1,
        )
        return out.swapaxes(1, 2), logsumexp

    def backward(self, saved: residuals.Saved, d_out: Array, scale: float) -> tuple[Array, ...]:
        """Gradients of queries, keys and values."""
        (q, k, v), segment_ids, out, logsumexp = saved
        # Padding sees the segment before it; what it puts out means nothing, so nothing flows back.
        d_out = jnp.where((segment_ids > 0)[:, :, None, None], d_out, 0)
        configuration = _configuration(q, scale, BACKWARD_PRODUCTS)
        if self.deterministic:
            configuration["force_deterministic"] = True
        *gradients, _ = self._call(
            BACKWARD,
            configuration,
            (q, k, v, logsumexp, d_out, out),
            [_by_head(value) for value in (q, k, v)],
            transposed=3,
        )
        return tuple(value.swapaxes(1, 2) for value in gradients)

    @staticmethod
    def _call(
        name: str,
        configuration: dict[str, Any],
        operands: tuple[Array, ...],
        results: list[jax.ShapeDtypeStruct],
        transposed: int,
    ) -> Any:
        """The custom call. The first results are [B, N, T, width] in shape and [B, T, N, width] in memory."""
        varying = jax.typeof(operands[0]).mat  # over a mesh's axes, inside shard_map
        workspace = jax.ShapeDtypeStruct((0,), jnp.uint8)  # XLA gives it its size
        shapes = [
            jax.ShapeDtypeStruct(s.shape, s.dtype, manual_axis_type=varying)
            for s in (*results, workspace)
        ]
        layouts = [
            (0, 2, 1, 3) if n < transposed else tuple(range(len(s.shape)))
            for n, s in enumerate(shapes)
        ]
        return jax.ffi.ffi_call(
            name,
            shapes,
            output_layouts=layouts,
            custom_call_api_version=2,
            legacy_backend_config=json.dumps(
                {"operation_queue_id": "0", "cudnn_fmha_backend_config": configuration}
            ),
        )(*operands)


def _by_head(rows: Array) -> jax.ShapeDtypeStruct:
    batch, length, heads, width = rows.shape
    return jax.ShapeDtypeStruct((batch, heads, length, width), rows.dtype)


def _configuration(
    q: Array, scale: float, products: dict[str, tuple[int, int, tuple[int, int], tuple[int, int]]]
) -> dict[str, Any]:
    """XLA's `CudnnfMHABackendConfig` for causal attention; 64-bit numbers are strings."""
    batch, length, heads, _ = q.shape
    return {
        "algorithm": {
            "algo_id": "0",
            "math_type": "TENSOR_OP_MATH",
            "tuning_knobs": {"17": "1", "24": "0"},
            "is_cudnn_frontend": True,
            "workspace_size": "0",
        },
        "fmha_scale": float(scale),
        "dropout_rate": 0.0,
        "seed": 42,
        "is_flash_attention": True,
        "mask_type": "CAUSAL",
        "sliding_window_length": 0,
        "max_seg_per_batch": 1,
        "is_paged_attention": False,
        "intermediate_tensor_shape": {
            "element_type": DTYPES[q.dtype],
            "dimensions": [str(n) for n in (batch, heads, length, length)],
            "is_dynamic_dimension": [False] * 4,
            "layout": {"minor_to_major": ["3", "2", "1", "0"]},
        },
    } | {
        f"{name}_dot_dimension_numbers": {
            "lhs_contracting_dimensions": [str(left)],
            "rhs_contracting_dimensions": [str(right)],
            "lhs_batch_dimensions": [str(n) for n in left_batch],
            "rhs_batch_dimensions": [str(n) for n in right_batch],
        }
        for name, (left, right, left_batch, right_batch) in products.items()
    }
