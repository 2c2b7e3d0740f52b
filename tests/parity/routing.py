"""What the routers of a foreign model decide, and how clearly.

A near-tie may fall differently for reasons of rounding alone, and then nothing after it can be
compared: goldens use tokens whose routing is clear.
"""

from contextlib import contextmanager

import numpy as np
import reference

MARGIN = 2e-3  # between the last chosen and the first rejected expert's score


@contextmanager
def recorded(model):
    """Collects (logits, weights, indices) of each router call, in the order of layers."""
    calls, hooks = [], []
    for name, module in model.named_modules():
        if name.endswith(".mlp.gate"):
            hook = module.register_forward_hook(
                lambda gate, _, output: calls.append((gate, *(x.detach() for x in output)))
            )
            hooks.append(hook)
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def margin(calls):
    """The smallest gap, over tokens and layers, between the k-th and the next choice score."""
    gaps = []
    for gate, router_logits, _, indices in calls:
        scores = (router_logits.sigmoid() + gate.e_score_correction_bias).sort(-1, True).values
        k = indices.shape[-1]
        gaps.append(float((scores[:, k - 1] - scores[:, k]).min()))
    return min(gaps)


def all_chosen(calls):
    """Whether each expert of each layer has a token."""
    return all(len(indices.unique()) == gate.num_experts for gate, *_, indices in calls)


def clear_tokens(model, rng, positions):
    """Random tokens at positions [B, T] whose routing is clear and leaves out no expert."""
    while True:
        tokens = rng.integers(0, model.config.vocab_size, positions.shape, dtype=np.int32)
        with recorded(model) as calls:
            reference.logits(model, tokens, positions)
        if margin(calls) > MARGIN and all_chosen(calls):
            return tokens
