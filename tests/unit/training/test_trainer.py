"""The Python interface: forward_backward, gradients, optim_step, sample, save, export, evaluate."""

import json

import jax
import numpy as np
import pytest

import kimi_jax
from kimi_jax import Trainer, UserError
from kimi_jax.weights.merge_report import report_of
from tests.unit.support import VOCAB, tiny_run, write_rows
from tests.unit.training.conftest import set_adapters

PEFT = "base_model.model."
SIZES = {  # of the tiny checkpoint, [out, in], by PEFT's module
    "self_attn.q_a_proj": (24, 64),
    "self_attn.q_b_proj": (2 * 24, 24),
    "self_attn.kv_a_proj_with_mqa": (24, 64),
    "self_attn.kv_b_proj": (2 * 28, 16),
    "self_attn.o_proj": (64, 24),
}
DENSE, EXPERT = 48, 32
# Steps of finite differences. Ahead of the router, a larger one sends tokens to other experts, where
# the loss jumps.
STEPS = {
    "self_attn": 1e-4,
    "dense_layers.mlp": 1e-4,
    "shared_experts": 1e-3,
    "mlp.experts": 1e-3,
    "lm_head": 1e-3,
}


def batch(seed=5, rows=4, length=16):
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.integers(0, VOCAB, (rows, length)).astype(np.int32),
        "loss_weights": rng.choice(np.float32([0, 0.5, 1]), (rows, length)),
    }


def mlp(module, width):
    return {
        f"{module}.gate_proj": (width, 64),
        f"{module}.up_proj": (width, 64),
        f"{module}.down_proj": (64, width),
    }


def expected_shapes(rank=2):
    """PEFT's name and shape of every factor, from the checkpoint's sizes alone."""
    modules = {"lm_head": (VOCAB, 64)}
    for layer in (0, 1):
        blocks = dict(SIZES)
        if layer == 0:
            blocks |= mlp("mlp", DENSE)
        else:
            blocks |= mlp("mlp.shared_experts", EXPERT)
            for expert in range(4):
                blocks |= mlp(f"mlp.experts.{expert}", EXPERT)
        modules |= {f"model.layers.{layer}.{name}": size for name, size in blocks.items()}
    shapes = {}
    for module, (out_size, in_size) in modules.items():
        shapes[f"{PEFT}{module}.lora_A.weight"] = (rank, in_size)
        shapes[f"{PEFT}{module}.lora_B.weight"] = (out_size, rank)
    return shapes


def peft_name(path, index):
    """PEFT's name of a part of a stacked factor: `moe_layers.mlp.experts.up_proj.lora_A`, (0, 3)."""
    stack, _, rest = path.partition(".")
    if stack == "lm_head":
        return f"{PEFT}{path}.weight"
    layer = {"dense_layers": 0, "moe_layers": 1}[stack] + index[0]
    if len(index) > 1:
        rest = rest.replace("experts.", f"experts.{index[1]}.")
    return f"{PEFT}model.layers.{layer}.{rest}.weight"


def state_of(trainer):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(trainer.state)]


def assert_same_state(found, required):
    assert len(found) == len(required)
    for one, other in zip(found, required, strict=True):
        np.testing.assert_array_equal(one, other)


def test_forward_backward_returns_sum_and_denominator(noisy):
    given = batch()
    found = noisy.forward_backward(given)
    assert found.keys() == {"loss_sum", "weight_sum", "loss"}
    assert found["weight_sum"] == given["loss_weights"][:, 1:].sum()
    assert found["loss"] == pytest.approx(found["loss_sum"] / found["weight_sum"], rel=1e-7)
    np.testing.assert_allclose(noisy.evaluate([given])["loss"], found["loss"], rtol=1e-6)


def test_gradients_have_pefts_names_and_shapes(noisy):
    """Guards export and research code that take the names for granted."""
    noisy.forward_backward(batch())
    gradients = noisy.gradients()
    assert {name: g.shape for name, g in gradients.items()} == expected_shapes()
    assert {g.dtype for g in gradients.values()} == {np.dtype(np.float32)}
    silent = [name for name, g in gradients.items() if not g.any()]
    assert all(".experts." in name for name in silent), silent  # only an expert may have no token


def test_gradients_are_those_of_the_loss(noisy):
    """Guards a factor's gradient that is missing, scaled, or under another's name."""
    given = batch()
    noisy.forward_backward(given)
    gradients = noisy.gradients()
    noisy._accumulated = None
    adapters = {path: np.asarray(value) for path, value in noisy.state.adapters.items()}
    rng = np.random.default_rng(1)
    for group, step in STEPS.items():
        direction, slope = {}, 0.0
        for path, value in adapters.items():
            moves = group in path
            direction[path] = rng.standard_normal(value.shape) * moves
            lead = value.shape[:-2]
            for index in np.ndindex(lead):
                gradient = gradients[peft_name(path, index)].astype(np.float64)
                slope += (gradient * direction[path][index]).sum()
        losses = []
        for move in (step, -step):
            moved = {path: value + move * direction[path] for path, value in adapters.items()}
            set_adapters(noisy, moved)
            losses.append(noisy.evaluate([given])["loss"])
        found = (losses[0] - losses[1]) / (2 * step)
        # fp32 losses near 9 have a resolution of 1e-6, which twice the step divides.
        assert found == pytest.approx(slope, rel=2e-3, abs=1e-6 / step), group


def test_accumulated_gradients_are_the_mean_over_all_weights(noisy):
    first, second = batch(1), batch(2)
    single = []
    for one in (first, second):
        terms = noisy.forward_backward(one)
        single.append((terms["weight_sum"], noisy.gradients()))
        noisy._accumulated = None
    for one in (first, second):
        noisy.forward_backward(one)
    total = sum(weight for weight, _ in single)
    for name, gradient in noisy.gradients().items():
        mean = sum(weight * each[name] for weight, each in single) / total
        np.testing.assert_allclose(gradient, mean, rtol=1e-5, atol=1e-7)


def test_optim_step_updates_once_and_forgets_the_gradients(noisy):
    noisy.forward_backward(batch())
    norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in noisy.gradients().values()))
    before = {path: np.asarray(value) for path, value in noisy.state.adapters.items()}
    result = noisy.optim_step()
    assert result.keys() == {"step", "loss", "grad_norm", "learning_rate"}
    assert result["step"] == noisy.step == 1
    assert result["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert result["learning_rate"] == pytest.approx(1e-2)
    changes = [np.abs(np.asarray(v) - before[p]).max() for p, v in noisy.state.adapters.items()]
    # AdamW's first update moves each value by the learning rate, whatever its gradient's size.
    assert max(changes) == pytest.approx(1e-2, rel=1e-3)
    with pytest.raises(UserError, match="call forward_backward first"):
        noisy.optim_step()
    with pytest.raises(UserError, match="call forward_backward first"):
        noisy.gradients()


def test_steps_lower_the_loss(trainer):
    given = batch()
    losses = []
    for _ in range(4):
        losses.append(trainer.forward_backward(given)["loss"])
        trainer.optim_step()
    assert sorted(losses, reverse=True) == losses
    assert losses[-1] < 0.8 * losses[0]


def test_evaluate_changes_nothing(noisy):
    """Guards evaluation that would feed held-out rows to the optimizer."""
    noisy.forward_backward(batch())
    before, gradients = state_of(noisy), noisy.gradients()
    assert noisy.evaluate([batch(7)]) == noisy.evaluate([batch(7)])
    assert_same_state(state_of(noisy), before)
    for name, gradient in noisy.gradients().items():
        np.testing.assert_array_equal(gradient, gradients[name])


def test_a_gradient_that_is_not_finite_changes_nothing(noisy):
    adapters = dict(noisy.state.adapters)
    adapters["lm_head.lora_A"] = adapters["lm_head.lora_A"].at[0, 0].set(np.nan)
    set_adapters(noisy, adapters)
    before = state_of(noisy)
    noisy.forward_backward(batch())
    with pytest.raises(UserError, match="not finite; the adapters are as they were"):
        noisy.optim_step()
    assert_same_state(state_of(noisy), before)


def test_no_weight_at_all_is_refused(noisy):
    given = batch()
    noisy.forward_backward(dict(given, loss_weights=np.zeros_like(given["loss_weights"])))
    with pytest.raises(UserError, match="every loss weight since the last optim_step is 0"):
        noisy.optim_step()


def bad(**changes):
    return {**batch(), **changes}


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        ({"tokens": batch()["tokens"]}, ["loss_weights: missing"]),
        (bad(labels=1), ["labels: unknown; known: tokens, loss_weights, positions, segment_ids"]),
        (bad(tokens=[[1, 2], [3]]), ["tokens: not an array of numbers, all rows of one length"]),
        (bad(tokens=np.zeros((4, 16))), ["tokens: found float64 (4, 16), required integers"]),
        (bad(tokens=np.zeros(16, int)), ["tokens: found shape (16,), required [B, T]"]),
        (bad(tokens=np.zeros((0, 16), int)), ["tokens: found shape (0, 16)", "at least one row"]),
        (bad(tokens=np.zeros((4, 1), int)), ["tokens: found shape (4, 1)", "two tokens"]),
        (
            bad(tokens=np.full((4, 16), VOCAB)),
            [f"token id {VOCAB} is outside", f"0 to {VOCAB - 1}"],
        ),
        (bad(tokens=np.full((4, 16), -1)), ["token id -1 is outside the vocabulary"]),
        # As int32 this would be the token 5.
        (bad(tokens=np.full((4, 16), 2**32 + 5)), ["token id 4294967301 is outside"]),
        (
            bad(loss_weights=np.ones((4, 15))),
            ["found shape (4, 15), required (4, 16), that of tok"],
        ),
        (bad(loss_weights=np.full((4, 16), np.nan)), ["loss_weights: not all finite"]),
        (bad(loss_weights="all"), ["loss_weights: not an array of numbers"]),
        (bad(positions=np.zeros((4, 16))), ["positions: found float64 (4, 16), required integers"]),
        (bad(positions=np.full((4, 16), -3)), ["positions: found -3 to -3; required: 0 to"]),
        (
            bad(positions=np.zeros((1, 16), int), segment_ids=np.zeros((4, 2), int)),
            ["positions: found shape (1, 16)", "segment_ids: found shape (4, 2)"],
        ),
        (bad(segment_ids=np.zeros((4, 16), int)), ["loss_weights: some in segment 0"]),
        (bad(loss_weights=np.full((4, 16), -1.0)), ["loss_weights: some below 0"]),
    ],
)
def test_bad_batches_are_refused_whole(trainer, given, messages):
    with pytest.raises(UserError) as error:
        trainer.forward_backward(given)
    for message in messages:
        assert message in str(error.value)
    assert trainer._accumulated is None


def test_positions_and_segments_are_filled_in(noisy):
    given = batch()
    explicit = dict(
        given,
        positions=np.tile(np.arange(16, dtype=np.int32), (4, 1)),
        segment_ids=np.full((4, 16), 3, np.int32),
    )
    lists = {key: value.tolist() for key, value in given.items()}
    assert noisy.evaluate([explicit]) == noisy.evaluate([given]) == noisy.evaluate([lists])


def test_save_and_restore(trainer, tiny, tmp_path):
    """Guards moments, counters or adapters that do not come back as they were."""
    write_rows(tmp_path / "train.jsonl")
    run = tiny_run(tmp_path, tiny)
    trained, restored = Trainer(run), Trainer(run)
    with pytest.raises(UserError, match="not a run directory"):
        trained.restore()
    assert not (tmp_path / "run").exists()
    for seed in (1, 2):
        trainer.forward_backward(batch(seed))
        trainer.optim_step()
    trained.state = trainer.state
    assert trained.save() == tmp_path / "run"
    trained.save()  # nothing new, nothing to do
    assert restored.restore() == {}
    assert restored.step == 2
    assert_same_state(state_of(restored), state_of(trainer))
    stranger = Trainer(run)
    with pytest.raises(UserError, match="holds a checkpoint of step 2, and step 0 was to be saved"):
        stranger.save()
    stranger.state = trainer.state
    with pytest.raises(UserError, match="holds a checkpoint of step 2, and step 2 was to be saved"):
        stranger.save()
    other = Trainer({**run, "lora": {**run["lora"], "alpha": 8}})
    for refused in (other.restore, other.save):
        with pytest.raises(UserError, match=r"lora\.alpha: the run has 4\.0, now 8\.0"):
            refused()


def test_exported_adapters_give_the_same_logits(noisy, tiny, tmp_path):
    """Guards names, orientation and scale of an exported adapter, and `load`."""
    tokens = batch()["tokens"]
    logits = np.asarray(noisy.model(tokens))
    out = noisy.export(tmp_path / "adapter", format="peft")
    assert out == tmp_path / "adapter"
    model = kimi_jax.load(tiny, adapter=out, dtype="float32")
    np.testing.assert_array_equal(np.asarray(model(tokens)), logits)
    with pytest.raises(UserError, match="not empty; nothing in it was touched"):
        noisy.export(out)


def test_a_merged_export_says_what_survived(noisy, tmp_path):
    """Guards a report that is lost, or that other processes than the first get in another form."""
    report = noisy.export(tmp_path / "merged", format="merged-bf16")
    assert report.directory == tmp_path / "merged"
    assert {projection.path for projection in report.projections} == set(noisy.plan)
    assert all(projection.survival.fidelity > 0.5 for projection in report.projections)
    assert report_of(json.loads(json.dumps(report.as_json()))) == report
