"""Answers in text: prompts through the chat template, tokens through the model, and back."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kimi_jax.data.chat import Chat, Reply
from kimi_jax.model.decode import Sampling, generate
from kimi_jax.model.transformer import ModelDef, Values

Prompt = str | list[dict[str, Any]] | np.ndarray
"""A user's text, chat messages, or the tokens of a rendered prompt."""


def answer(
    model_def: ModelDef,
    base: Values,
    adapters: Values,
    chat: Chat,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    sampling: Sampling,
) -> list[Reply]:
    """What the model says to each prompt, reasoning and content apart; all are answered in one batch."""
    continued = generate(
        model_def,
        base,
        adapters,
        render(prompts, chat),
        max_new_tokens,
        sampling,
        model_def.config.eos_token_ids,
    )
    return [chat.parse_reply(ids.tolist()) for ids in continued]


def render(prompts: Sequence[Prompt], chat: Chat) -> list[np.ndarray]:
    """Tokens of each prompt up to where the assistant begins to write."""
    return [_tokens(prompt, chat) for prompt in prompts]


def _tokens(prompt: Prompt, chat: Chat) -> np.ndarray:
    if isinstance(prompt, np.ndarray):
        return prompt
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return chat.render_prompt(prompt)
