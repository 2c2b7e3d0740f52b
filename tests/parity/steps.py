"""Optimizer steps of torch.optim.AdamW on peft adapters, and the batches they see."""

import math

import adapters
import numpy as np
import reference
import torch

DATA_SEED = 7
STEPS = 20
WARMUP = 5
PEAK_RATE = 2e-3
FINAL_FRACTION = 0.1
BETAS = (0.9, 0.999)
EPSILON = 1e-8
WEIGHT_DECAY = 0.01
CLIP = 1.0


def draw_weights(rng, shape):
    """Loss weights 0, 0.5 or 1; the first place predicts nothing and has none."""
    weights = rng.choice(np.float32([0, 0.5, 1]), shape, p=[0.2, 0.2, 0.6])
    weights[:, 0] = 0
    return weights


def learning_rate(step):
    """Of step 0, 1, …: linear warm-up that ends at the peak, then a cosine to its tenth part."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    progress = (step - WARMUP) / (STEPS - WARMUP)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return PEAK_RATE * (FINAL_FRACTION + (1 - FINAL_FRACTION) * cosine)


def draw_batch(rng, vocab):
    """Sequences that can be learned: few tokens, each mostly followed by its fixed successor."""
    used = np.random.default_rng(DATA_SEED).permutation(vocab)[:16]
    places = rng.integers(0, len(used), (3, 16))
    for place in range(1, places.shape[1]):
        follow = rng.random(len(places)) < 0.9
        places[follow, place] = (places[follow, place - 1] + 1) % len(used)
    tokens = used[places].astype(np.int32)
    return tokens, draw_weights(rng, tokens.shape)


def train(model, batches):
    """AdamW steps on batches; `batches(step, model)` may look at the model as it then is."""
    parameters = list(adapters.trainable(model).values())
    optimizer = torch.optim.AdamW(
        parameters, lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY
    )
    losses, norms = [], []
    for step in range(STEPS):
        tokens, weights = batches(step, model)
        optimizer.zero_grad()
        logits = reference.forward(model, tokens).logits
        loss = adapters.loss_sum(logits, tokens, weights) / float(weights.sum())
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, CLIP)))
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
    return np.float64(losses), np.float64(norms)
