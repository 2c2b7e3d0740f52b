"""Sampling with the compressed latent cache: one jitted program for prompt and continuation."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kimi_jax.errors import UserError
from kimi_jax.model.config import ModelConfig
from kimi_jax.model.gathered import gathered
from kimi_jax.model.transformer import ModelDef, Values, check_tokens
from kimi_jax.parallel.ranks import REPLICATED

PROMPT_MULTIPLE = 32  # prompts are padded to it, so that few lengths are compiled


class Sampling(NamedTuple):
    """How the next token is drawn. temperature 0: the likeliest; top_p 1: the whole distribution."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Refuses what is not a distribution."""
        if not self.temperature >= 0:
            raise UserError(f"temperature is {self.temperature}; required: 0 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; required: above 0 and at most 1")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"seed is {self.seed}; required: 0 to {2**31 - 1}")


def generate(
    model_def: ModelDef,
    base: Values,
    adapters: Values,
    prompts: list[np.ndarray],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
) -> list[np.ndarray]:
    """Continues prompts of any lengths together.

    Args:
        model_def: the model's structure.
        base: base weights by path.
        adapters: adapter factors by path; empty if there is no adapter.
        prompts: token ids, int32 [length], none empty.
        max_new_tokens: at most so many tokens for each prompt.
        sampling: how tokens are drawn; the same seed gives the same tokens.
        stop_ids: ids that end a continuation (which then includes the id).

    Returns:
        The new tokens of each prompt, int32, without the prompt.

    Raises:
        UserError: an empty prompt, ids outside the vocabulary, a length beyond the model's positions.
    """
    check_request(model_def.config, prompts, max_new_tokens, sampling)
    longest = max(len(prompt) for prompt in prompts)
    width = -(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    request = (
        tokens,
        np.asarray([len(prompt) for prompt in prompts], np.int32),
        np.float32(sampling.temperature),
        np.float32(sampling.top_p),
        np.int32(sampling.seed),
        np.asarray(stop_ids, np.int32),
    )
    caches = cache_bytes(model_def, len(prompts), width + max_new_tokens)
    model_def, base = gathered(model_def, base, caches)
    put = model_def.settings.ranks.put
    new, count = _generate(
        model_def,
        max_new_tokens,
        sampling.temperature > 0,
        dict(base),
        dict(adapters),
        *(put(np.asarray(value), REPLICATED) for value in request),
    )
    new, count = np.asarray(new), np.asarray(count)
    return [new[row, : count[row]] for row in range(len(prompts))]


def check_request(
    config: ModelConfig, prompts: list[np.ndarray], max_new_tokens: int, sampling: Sampling
) -> None:
    """Refuses what `generate` would refuse, without the model's values.

    Raises:
        UserError: see `generate`.
    """
    sampling.check()
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; required: at least 1")
    if not prompts or min(len(prompt) for prompt in prompts) == 0:
        raise UserError("a prompt without a token: nothing can be continued")
    longest, limit = max(len(prompt) for prompt in prompts), config.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise UserError(
            f"the longest prompt has {longest} tokens, and {max_new_tokens} more are asked for; the "
            f"model has {limit} positions: shorten the prompt or max_new_tokens"
        )
    for prompt in prompts:
        check_tokens(prompt, config)


def cache_bytes(model_def: ModelDef, batch: int, length: int) -> int:
    """Of the latent cache for `batch` rows of up to `length` positions, which every rank has whole."""

    def caches(base: Values, adapters: Values) -> Any:
        return model_def.bind(base, adapters).empty_caches(batch, length)

    shapes = jax.eval_shape(caches, model_def.base_shapes, model_def.adapter_shapes)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


class _Loop(NamedTuple):
    made: Array  # steps so far
    last: Array  # [B] the token that comes next into the model
    tokens: Array  # [B, max_new]
    count: Array  # [B] tokens of each continuation
    done: Array  # [B]
    caches: Any


@partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
    model_def: ModelDef,
    max_new: int,
    draw: bool,
    base: Any,
    adapters: Any,
    prompts_BT: Int[Array, "B T"],
    lengths_B: Int[Array, " B"],
    temperature: Array,
    top_p: Array,
    seed: Array,
    stop_ids: Array,
) -> tuple[Int[Array, "B new"], Int[Array, " B"]]:
    specs = (model_def.base_specs, model_def.adapter_specs, *[REPLICATED] * 6)
    continued = partial(_continue, model_def, max_new, draw)
    run = model_def.settings.ranks.run(continued, specs, (REPLICATED, REPLICATED))
    return run(base, adapters, prompts_BT, lengths_B, temperature, top_p, seed, stop_ids)


def _continue(
    model_def: ModelDef,
    max_new: int,
    draw: bool,
    base: Any,
    adapters: Any,
    prompts_BT: Array,
    lengths_B: Array,
    temperature: Array,
    top_p: Array,
    seed: Array,
    stop_ids: Array,
) -> tuple[Array, Array]:
    model, ranks = model_def.bind(base, adapters), model_def.settings.ranks
    key = jax.random.key(seed)
    batch, width = prompts_BT.shape

    def choose(logits_BV: Array, step: Array) -> Array:
        if draw:
            kept = nucleus(logits_BV / temperature, top_p)
            chosen = jax.random.categorical(jax.random.fold_in(key, step), kept)
        else:
            chosen = jnp.argmax(logits_BV, axis=-1)
        return ranks.agreed(chosen.astype(jnp.int32))

    # Places past a prompt's end are filled with what its padding gives, and overwritten one by one
    # before anything attends to them: place s is visible to positions from s on only.
    positions = jnp.broadcast_to(jnp.arange(width), prompts_BT.shape)
    hidden, caches = model.decode(prompts_BT, positions, model.empty_caches(batch, width + max_new))
    ends = hidden[jnp.arange(batch), lengths_B - 1]
    first = choose(model.head_logits(ends), jnp.int32(0))

    def step(loop: _Loop) -> _Loop:
        tokens = loop.tokens.at[:, loop.made].set(loop.last)
        count = loop.count + ~loop.done
        done = loop.done | jnp.isin(loop.last, stop_ids)
        places = (lengths_B + loop.made)[:, None]
        hidden, caches = model.decode(loop.last[:, None], places, loop.caches)
        last = choose(model.head_logits(hidden[:, 0]), loop.made + 1)
        return _Loop(loop.made + 1, last, tokens, count, done, caches)

    start = _Loop(
        jnp.int32(0),
        first,
        jnp.zeros((batch, max_new), jnp.int32),
        jnp.zeros((batch,), jnp.int32),
        jnp.zeros((batch,), bool),
        caches,
    )
    end = jax.lax.while_loop(lambda loop: (loop.made < max_new) & ~loop.done.all(), step, start)
    return end.tokens, end.count


def nucleus(logits_BV: Float[Array, "B V"], top_p: Float[Array, ""]) -> Float[Array, "B V"]:
    """Keeps the likeliest tokens whose probabilities first reach `top_p`; the others become -inf.

    The likeliest token always stays (arXiv:1904.09751).
    """
    falling = jnp.sort(logits_BV, axis=-1)[:, ::-1]
    probabilities = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(before < top_p, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV < least, -jnp.inf, logits_BV)
