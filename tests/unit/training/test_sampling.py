"""Answers through the Python interface: prompts of three forms, their end, and the untrained adapter."""

import numpy as np
import pytest

from kimi_jax import UserError
from tests.unit.support import END, VOCAB
from tests.unit.training.conftest import greedy, set_adapters


def test_the_three_forms_of_a_prompt_are_one(noisy):
    question = "Where is the cat?"
    messages = [{"role": "user", "content": question}]
    tokens = noisy.chat.render_prompt(messages)
    answers = noisy.sample([question, messages, tokens], max_new_tokens=8)
    assert len(set(answers)) == 1
    assert isinstance(answers[0], str)
    asked = [{"role": "system", "content": "Be brief."}, *messages]
    assert noisy.chat.render_prompt(asked).tolist() != tokens.tolist()
    with pytest.raises(UserError, match="nothing to answer"):
        noisy.sample([[*messages, {"role": "assistant", "content": "Here."}]])


def test_samples_end_at_the_end_token(noisy):
    """Guards answers that run on past the checkpoint's end token."""
    prompts = [noisy.chat.render_prompt([{"role": "user", "content": "Who sings?"}])] * 3
    likeliest = greedy(noisy, prompts)[0][0]
    adapters = {path: np.asarray(value).copy() for path, value in noisy.state.adapters.items()}
    adapters["lm_head.lora_B"][:] = 0
    set_adapters(noisy, adapters)
    assert noisy.sample(prompts, max_new_tokens=8)[0]
    # The end token's logit becomes many times that of the token that would have come first.
    adapters["lm_head.lora_A"][0] = np.asarray(noisy.base["lm_head.weight"], np.float32)[likeliest]
    adapters["lm_head.lora_B"][END, 0] = 100
    set_adapters(noisy, adapters)
    assert noisy.sample(prompts, max_new_tokens=8) == ["", "", ""]


def test_with_a_zero_adapter_the_answers_are_the_bases(trainer, base_parts):
    """Invariant 4, through sampling: B = 0 changes no token and no logit."""
    questions = ["Where is the cat?", "Who sings?", "What grows in the garden?"]
    prompts = [trainer.chat.render_prompt([{"role": "user", "content": q}]) for q in questions]
    base = greedy(base_parts, prompts)
    for found, required in zip(greedy(trainer, prompts), base, strict=True):
        np.testing.assert_array_equal(found, required)
    texts = [trainer.chat.parse_reply(ids.tolist()).content for ids in base]
    assert trainer.sample(questions, max_new_tokens=8) == texts
    tokens = np.random.default_rng(5).integers(0, VOCAB, (4, 16)).astype(np.int32)
    logits = np.asarray(base_parts.model(tokens))
    np.testing.assert_array_equal(np.asarray(trainer.model(tokens)), logits)
