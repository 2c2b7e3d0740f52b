"""Latent attention of as many heads as K2 has, on a Hopper GPU: which head is which, and their sum."""

import numpy as np
import pytest

from tests.device import needs
from tests.device.test_attention import compare

pytestmark = needs.a_hopper_gpu

HEADS, LENGTH = 64, 2048
LENGTHS = {
    "one segment": [LENGTH],
    "packed": [700, 1, 63, 128, 556, 300, 299],  # and one place of padding
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_output_and_gradients(lengths):
    """A head's tile taken from another, or left out of the shared key's gradient, shows here."""
    ids = np.zeros((1, LENGTH), np.int32)
    ids[0, : sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
    compare("pallas", ids, HEADS)
