"""What is asked of cuDNN, as far as that can be seen without a GPU; tests/device has the numbers."""

import re

import jax
import jax.numpy as jnp
import pytest

from kimi_jax.errors import UserError
from kimi_jax.kernels import api
from kimi_jax.kernels.mla_attention import cudnn
from kimi_jax.kernels.mla_attention.residuals import LOGSUMEXP_NAME, OUTPUT_NAME

SCALE, ROPE = 0.25, 64


def operands(dtype=jnp.bfloat16, key=192, value=128):
    shapes = ((3, key), (3, key - ROPE + value), (ROPE,))
    arrays = [jax.ShapeDtypeStruct((2, 64, *shape), dtype) for shape in shapes]
    return *arrays, jax.ShapeDtypeStruct((2, 64), jnp.int32)


def lowered(function):
    return jax.jit(function).trace(*operands()).lower(lowering_platforms=("cuda",)).as_text()


def attend(*operands):
    return api.latent_attention(*operands, SCALE, impl="cudnn", packed=False)


def total(attend):
    """Its gradients, with a cotangent that is not zero."""
    return jax.grad(
        lambda *operands: (attend(*operands).astype(jnp.float32) ** 2).sum(),
        argnums=(0, 1, 2),
    )


def test_both_passes():
    """One call each, causal, of one segment a row: the form with several kills the CUDA context."""
    text = lowered(total(attend))
    assert re.findall(r"custom_call @(\S+?)\(", text) == [cudnn.FORWARD, cudnn.BACKWARD]
    assert text.count(r"mask_type\22: \22CAUSAL\22") == 2
    assert text.count(r"max_seg_per_batch\22: 1,") == 2
    assert text.count(rf"fmha_scale\22: {SCALE},") == 2
    assert "force_deterministic" not in text


def test_results_stand_as_rows():
    """By head in shape, by row in memory: no transpose is computed."""
    assert "result_layouts = [dense<[3, 1, 2, 0]> : tensor<4xindex>" in lowered(attend)


def test_deterministic():
    def function(*operands):
        return cudnn.attention(*operands, SCALE, deterministic=True)

    assert lowered(total(function)).count(r"force_deterministic\22: true") == 1


@pytest.mark.parametrize(("names", "calls"), [((OUTPUT_NAME, LOGSUMEXP_NAME), 1), ((), 2)])
def test_saved_names_spare_the_forward_pass(names, calls):
    """Under recomputation, the forward operation runs again unless what it gave is kept."""
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    text = lowered(total(jax.checkpoint(attend, policy=policy)))
    assert text.count(f"@{cudnn.FORWARD}(") == calls


def test_refuses_packed_rows():
    with pytest.raises(UserError, match="packed=False"):
        jax.eval_shape(lambda *a: api.latent_attention(*a, SCALE, impl="cudnn"), *operands())


@pytest.mark.parametrize("change", [{"dtype": jnp.float32}, {"key": 260}, {"value": 100}])
def test_refuses_other_operands(change):
    with pytest.raises(UserError, match="required"):
        jax.eval_shape(attend, *operands(**change))
