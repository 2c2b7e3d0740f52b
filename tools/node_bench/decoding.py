"""Decoding with the latent cache: tokens a second once the prompt has been read, compilation apart."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kimi_jax.model.decode import Sampling, generate
from kimi_jax.model.transformer import ModelDef, Values

NEVER = -1  # an id that no token has
PROMPT = 32  # tokens


def measure_decoding(
    model_def: ModelDef,
    base: Values,
    adapters: Values,
    batches: Sequence[int],
    new: int,
    found: dict[str, Any],
    done: Callable[[dict[str, Any]], None],
) -> None:
    """Continues random prompts, the likeliest token each time.

    The program of a batch is run whole, and once more with ids that end it after the first token; the
    difference is that of the tokens in between.

    Args:
        model_def: the model's structure, on its ranks.
        base: its weights.
        adapters: its adapters' factors.
        batches: numbers of prompts.
        new: tokens that each is continued by, at least 2.
        found: gets a row for each batch.
        done: called with each row.
    """
    rows = found["batches"] = []
    for batch in batches:
        rng = np.random.default_rng(batch)
        vocabulary = model_def.config.vocab_size
        prompts = list(rng.integers(0, vocabulary, (batch, PROMPT), np.int32))

        def run(
            stop: Sequence[int], prompts: list[np.ndarray] = prompts
        ) -> tuple[list[np.ndarray], float]:
            began = time.perf_counter()
            tokens = generate(model_def, base, adapters, prompts, new, Sampling(), tuple(stop))
            return tokens, time.perf_counter() - began

        never = [NEVER] * batch  # as many ids as there are first tokens, so that one program serves
        _, first = run(never)
        tokens, whole = run(never)
        short, begun = run([int(row[0]) for row in tokens])
        made = max(len(row) for row in short)
        assert all(len(row) == new for row in tokens), "a continuation ended by itself"
        assert made < new, "first tokens differ from run to run: nothing to subtract"
        step = (whole - begun) / (new - made)
        rows.append(
            {
                "batch": batch,
                "prompt_tokens": PROMPT,
                "new_tokens": new,
                "first_call_s": first,
                "compile_s": first - whole,
                "whole_s": whole,
                "prompt_and_first_s": begun,
                "token_s": step,
                "tokens_a_second": batch / step,
                "tokens_a_second_with_prompt": batch * new / whole,
            }
        )
        done(rows[-1])
