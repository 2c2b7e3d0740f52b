"""The table before the first step: what trains, how much of it, and what stays frozen."""

import io

from rich.console import Console

from kimi_jax.config import LoraSection
from kimi_jax.console import WIDTH_OF_A_FILE
from kimi_jax.lora import plan_adapters
from kimi_jax.training.report import trainable_table


def shown(trainer, **changes):
    """The table's lines for other settings of adapters, by their first word."""
    settings = LoraSection(**{"rank": 2, "alpha": 4.0, "targets": ("attention",), **changes})
    table = trainer.checkpoint.table
    console = Console(width=WIDTH_OF_A_FILE, record=True, file=io.StringIO())
    console.print(trainable_table(table, plan_adapters(settings, table)))
    lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
    return {words[0]: words for words in lines}


def test_what_trains_and_what_does_not(shared_trainer):
    lines = shown(shared_trainer, targets=("attention", "dense", "shared", "routed", "head"))
    trained = sum(value.size for value in shared_trainer.state.adapters.values())
    assert f"{trained:,}" in lines["all"]
    for frozen in ("embed_tokens", "norm", "mlp.gate.weight", "input_layernorm"):
        assert "frozen" in lines[frozen]
    experts = lines["mlp.experts.gate_proj"]
    assert "int4" in experts
    assert f"{4 * 2 * (64 + 32):,}" in experts  # experts, rank, in and out


def test_shared_factors_and_other_ranks_are_said(shared_trainer):
    lines = shown(
        shared_trainer,
        targets=("routed", "self_attn.o_proj"),
        expert_rank=3,
        expert_factors="shared",
    )
    text = " ".join(lines["mlp.experts.down_proj"])
    assert "rank 3, alpha 6, one shared" in text
    assert f"{4 * 3 * 32 + 3 * 64:,}" in text
    assert "frozen" in lines["self_attn.q_a_proj"]
    assert f"{2 * 2 * (64 + 24):,}" in lines["self_attn.o_proj"]  # layers, rank, out and in
