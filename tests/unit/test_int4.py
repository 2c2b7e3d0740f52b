"""The packed format against words that compressed-tensors wrote, bit by bit."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kimi_jax import int4


@pytest.fixture(scope="module")
def golden(golden_dir):
    """Codes, words, scales and weights; bf16 is stored as its bits."""
    stored = np.load(golden_dir / "int4_compressed_tensors.npz")
    return {
        "codes": stored["codes"],
        "words": stored["packed"],
        "scale": stored["scale"].view(ml_dtypes.bfloat16),
        "weight": stored["weight"].view(ml_dtypes.bfloat16),
    }


def same_bits(found, expected):
    found = np.asarray(found)
    return found.dtype == expected.dtype and found.tobytes() == expected.tobytes()


def test_golden_uses_every_code(golden):
    # Without all sixteen codes, a wrong offset could pass the tests below.
    assert sorted(np.unique(golden["codes"])) == list(range(-8, 8))


def test_words_to_int4_reads_foreign_words(golden):
    """Two's complement for offset binary, or the high nibble first, would read other values."""
    values = int4.words_to_int4(jnp.asarray(golden["words"]))
    assert np.array_equal(np.asarray(values).astype(np.int8), golden["codes"])


def test_int4_to_words_writes_foreign_words(golden):
    values = jnp.asarray(golden["codes"].astype(ml_dtypes.int4))
    assert same_bits(int4.int4_to_words(values), golden["words"])


def test_leading_dimensions_stay(golden):
    """A layer's experts are unpacked at once: [E, out, in/8] must not mix experts."""
    words = golden["words"].reshape(4, 12, 12)
    values = int4.words_to_int4(jnp.asarray(words))
    assert np.array_equal(np.asarray(values).astype(np.int8), golden["codes"].reshape(4, 12, 96))
    assert same_bits(int4.int4_to_words(values), words)


def test_host_functions_agree_with_foreign_words(golden):
    assert same_bits(int4.unpack_numpy(golden["words"]), golden["codes"])
    assert same_bits(int4.pack_numpy(golden["codes"]), golden["words"])


def test_known_words():
    codes = np.array([[-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7]], np.int8)
    words = np.array([[0x76543210, 0xFEDCBA98]], np.uint32).view(np.int32)
    assert same_bits(int4.pack_numpy(codes), words)
    assert same_bits(int4.unpack_numpy(words), codes)


def test_pack_refuses_codes_that_do_not_fit():
    for code in (-9, 8):
        with pytest.raises(AssertionError, match="int4 codes"):
            int4.pack_numpy(np.full((1, 8), code, np.int8))


def test_dequantised_weights_are_the_foreign_ones(golden):
    """The product is rounded once, from fp32: rounding it in bf16 arithmetic moves some last bits."""
    values = jnp.asarray(golden["codes"].astype(ml_dtypes.int4))
    scale_in_memory = jnp.asarray(np.ascontiguousarray(golden["scale"].T))
    assert same_bits(int4.dequantise(values, scale_in_memory), golden["weight"])
    assert same_bits(int4.dequantise_numpy(golden["codes"], golden["scale"]), golden["weight"])


@pytest.fixture(scope="module")
def weight():
    drawn = np.random.default_rng(0).normal(size=(3, 6, 96)).astype(np.float32)
    drawn[0, 0, :32] = 0
    return drawn


def test_scale_is_a_seventh_of_the_largest_value(weight):
    """7, not 7.5: Moonshot's rule leaves -8 unused."""
    codes, scale = int4.quantise_numpy(weight)
    absmax = np.abs(weight.reshape(3, 6, 3, 32)).max(-1)
    expected = np.maximum(absmax / np.float32(7), np.float32(1e-5)).astype(ml_dtypes.bfloat16)
    assert same_bits(scale, expected)
    assert codes.dtype == np.int8
    assert codes.min() == -7
    assert codes.max() == 7


def test_codes_are_the_nearest_to_what_will_be_read(weight):
    codes, scale = int4.quantise_numpy(weight)
    step = np.repeat(scale.astype(np.float32), 32, axis=-1)
    error = np.abs(codes * step - weight)
    # At ±7 the rounded scale may be smaller than the seventh it stands for.
    assert (error <= np.where(np.abs(codes) == 7, 0.55, 0.5001) * step).all()


def test_zero_group_stays_zero(weight):
    codes, scale = int4.quantise_numpy(weight)
    assert not codes[0, 0, :32].any()
    assert np.float32(scale[0, 0, 0]) == np.float32(ml_dtypes.bfloat16(1e-5))


def test_requantising_what_was_read_gives_the_same_codes():
    """Every group whose largest code is ±7 comes back exactly, under every bf16 scale."""
    rng = np.random.default_rng(1)
    codes = rng.integers(-7, 8, (256, 64)).astype(np.int8)
    codes[:, ::32] = rng.choice([-7, 7], (256, 2))
    scale = rng.uniform(0.001, 0.1, (256, 2)).astype(ml_dtypes.bfloat16)
    again, _ = int4.quantise_numpy(int4.dequantise_numpy(codes, scale))
    assert np.array_equal(again, codes)
