"""One device and eight: the same losses, gradients, logits and answers, whatever the routing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax import Trainer, UserError, load
from kimi_jax.kernels.token_movement import dispatch_window, movement
from kimi_jax.model import gathered as decoding
from kimi_jax.model.decode import cache_bytes
from kimi_jax.model.gathered import gathered
from kimi_jax.parallel import experts
from kimi_jax.training.step import init_state
from tests.unit.support import tiny_run, write_rows, write_tiny_checkpoint

EXPERTS, ROWS, LENGTH, STEPS = 16, 8, 40, 10
BIAS = "moe_layers.mlp.gate.e_score_correction_bias"
# All tokens to the experts of the first of eight ranks; or what the router's scores say; or a bias
# that spreads more evenly than the scores.
ROUTINGS = {
    "skewed": np.where(np.arange(EXPERTS) < 2, 10.0, 0.0),
    "natural": None,
    "even": np.zeros(EXPERTS),
}
MESHES = {"one": {}, "eight": {"expert": 8, "expert_buffer": 0.3}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny checkpoint with enough experts for eight ranks."""
    return write_tiny_checkpoint(
        tmp_path_factory.mktemp("mesh") / "checkpoint", n_routed_experts=EXPERTS
    )


@pytest.fixture(scope="module")
def trainers(checkpoint, tmp_path_factory, light_compiler):
    folder = tmp_path_factory.mktemp("runs")
    write_rows(folder / "train.jsonl")
    return {
        name: Trainer(
            tiny_run(folder, checkpoint, train__micro_batch=ROWS, train__learning_rate=1e-3)
            | {"mesh": mesh}
        )
        for name, mesh in MESHES.items()
    }


OWN_BIAS = {}  # the checkpoint's, by trainer
HALVES = {"expert": 4, "expert_buffer": 0.3, "half_batches": 2}
KEPT = {"train__keep": ["stream", "expert_gate"], "train__offload": ["queries", "expert_up"]}


def begin(trainer, routing):
    """Adapters that change the model, the same on every mesh, and a routing."""
    rng = np.random.default_rng(1)
    specs = trainer.model_def.adapter_specs
    adapters = {
        path: trainer.ranks.put(
            0.1 * rng.standard_normal(value.shape).astype(np.float32), specs[path]
        )
        for path, value in sorted(trainer.state.adapters.items())
    }
    trainer.state = init_state(adapters, trainer._programs.optimizer, trainer.ranks)
    trainer._accumulated = None
    own = OWN_BIAS.setdefault(trainer, trainer.base[BIAS])
    bias = ROUTINGS[routing]
    if bias is not None:
        spec = trainer.model_def.base_specs[BIAS]
        own = trainer.ranks.put(np.broadcast_to(bias, own.shape).astype(np.float32), spec)
    trainer.base[BIAS] = own


def batches(rows=ROWS):
    """Full rows, rows of several documents, and padding."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        ends = np.sort(rng.integers(1, LENGTH, (rows, 2)), axis=1)
        place = np.arange(LENGTH)
        segments = 1 + (place >= ends[:, :1]) + (place >= ends[:, 1:])
        segments[0, LENGTH // 2 :] = 0
        starts = np.where(segments == 2, ends[:, :1], np.where(segments == 3, ends[:, 1:], 0))
        yield {
            "tokens": rng.integers(0, 1000, (rows, LENGTH)).astype(np.int32),
            "loss_weights": (rng.random((rows, LENGTH)) * (segments > 0)).astype(np.float32),
            "segment_ids": segments.astype(np.int32),
            "positions": (place - starts).astype(np.int32),
        }


@pytest.mark.parametrize("routing", ROUTINGS)
def test_losses_and_gradients(trainers, routing):
    """1e-5 relative: sums of fp32 numbers in another order; a dropped or doubled token is 1e-3."""
    compare(trainers["eight"], trainers["one"], routing, list(batches()))


def compare(mesh, one, routing, given):
    """The losses of all batches, and the gradients of the first."""
    losses, gradients = {}, {}
    for trainer in (mesh, one):
        begin(trainer, routing)
        losses[trainer] = []
        for batch in given:
            losses[trainer].append(trainer.forward_backward(batch)["loss"])
            gradients.setdefault(trainer, trainer.gradients())
            trainer.optim_step()
    np.testing.assert_allclose(losses[mesh], losses[one], rtol=1e-5)
    assert gradients[mesh].keys() == gradients[one].keys()
    for path, wanted in gradients[one].items():
        found = gradients[mesh][path]
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max(), path


def test_parts_of_two_rows_and_one(trainers, checkpoint, tmp_path):
    """Three rows on each of four devices, and some results kept on them, some in the host's memory."""
    write_rows(tmp_path / "train.jsonl")
    given = tiny_run(tmp_path, checkpoint, train__micro_batch=12, train__learning_rate=1e-3, **KEPT)
    halves = Trainer(given | {"mesh": HALVES})
    compare(halves, trainers["one"], "natural", list(batches(12))[:2])


def test_rows_that_are_nobodys_may_be_anything(trainers, checkpoint, tmp_path, monkeypatch):
    """Kernels on Hopper leave them unwritten: rows, and in the derivative their cotangents."""

    def poisoned(x, order, k, start, capacity, impl="auto"):
        rows = dispatch_window(x, order, k, start, capacity, impl)
        if x.shape[-1] == 1:  # routing weights, which no kernel moves
            return rows
        ours = start + np.arange(capacity) < order.group_sizes.sum()
        return jnp.where(ours[:, None], rows, jnp.nan)

    for module in (experts, movement):
        monkeypatch.setattr(module, "dispatch_window", poisoned)
    write_rows(tmp_path / "train.jsonl")
    given = tiny_run(tmp_path, checkpoint, train__micro_batch=8, train__learning_rate=1e-3)
    mesh = Trainer(given | {"mesh": {"expert": 4, "expert_buffer": 1.5}})
    compare(mesh, trainers["one"], "natural", list(batches())[:2])


def test_the_state_stays_where_it_is(trainers):
    """An update that gathered or replicated experts' moments would not fit at full size."""
    trainer = trainers["eight"]
    begin(trainer, "even")
    before = {path: value.sharding for path, value in trainer.state.adapters.items()}
    trainer.forward_backward(next(batches()))
    trainer.optim_step()
    for path, value in trainer.state.adapters.items():
        assert value.sharding.is_equivalent_to(before[path], value.ndim), path
    moments = trainer.state.opt_state[1][0].mu
    for path, value in moments.items():
        assert value.sharding.is_equivalent_to(before[path], value.ndim), path


def test_logits_and_answers(trainers):
    """Rows that do not divide over ranks are whole on all of them."""
    tokens = np.random.default_rng(2).integers(0, 1000, (3, 7)).astype(np.int32)
    prompts = [np.arange(5, dtype=np.int32), np.arange(9, dtype=np.int32)]
    found = {}
    for name, trainer in trainers.items():
        begin(trainer, "even")
        found[name] = np.asarray(trainer.model(tokens)), trainer.sample(prompts, max_new_tokens=4)
    np.testing.assert_allclose(found["eight"][0], found["one"][0], atol=2e-5)
    assert found["eight"][1] == found["one"][1]


def test_decoding_gathers_once_if_there_is_memory(trainers, monkeypatch, caplog):
    """Answers are the same either way, and what is held from step to step stays in parts."""
    trainer = trainers["eight"]
    begin(trainer, "even")
    prompts = [np.arange(5, dtype=np.int32)]
    definition = trainer.model_def
    whole, base = gathered(definition, trainer.base)
    moved = [p for p in base if base[p] is not trainer.base[p]]
    assert "moe_layers.self_attn.o_proj.weight" in moved
    assert not any(".experts." in path or path.startswith(("embed", "lm_head")) for path in moved)
    for path in moved:
        assert base[path].sharding.is_fully_replicated, path
        assert not trainer.base[path].sharding.is_fully_replicated, path
        np.testing.assert_array_equal(base[path], trainer.base[path])
    assert whole.base_specs != definition.base_specs
    caches = trainer.model.empty_caches(3, 40)
    assert cache_bytes(definition, 3, 40) == sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
    once = trainer.sample(prompts, max_new_tokens=4)
    monkeypatch.setattr(decoding, "_free", lambda: 1 << 30)
    assert gathered(definition, trainer.base) == (definition, trainer.base)
    assert "1.0 GiB are free" in caplog.text
    assert trainer.sample(prompts, max_new_tokens=4) == once


def test_held_out_loss(trainers):
    losses = {}
    for name, trainer in trainers.items():
        begin(trainer, "even")
        losses[name] = trainer.evaluate(list(batches())[:2])["loss"]
    assert losses["eight"] == pytest.approx(losses["one"], rel=1e-6)


def test_load_on_a_mesh(checkpoint, trainers):
    """`load` spreads a model the same way, with weights that are not experts' whole."""
    model = load(checkpoint, dtype="float32", mesh={"expert": 4, "rest": "replicated"})
    tokens = np.arange(8, dtype=np.int32).reshape(2, 4)
    wanted = load(checkpoint, dtype="float32")(tokens)
    np.testing.assert_allclose(model(tokens), wanted, atol=2e-5)


@pytest.mark.parametrize(
    ("mesh", "complaint"),
    [
        ({"expert": 3}, "train.micro_batch is 8; it must be a multiple"),
        ({"expert": 16}, "train.micro_batch is 8; it must be a multiple"),
        (
            {"expert": 8, "half_batches": 2},
            "at least mesh.expert × mesh.data × mesh.half_batches = 8 × 1 × 2 = 16",
        ),
        ({"expert": 8, "rest": "halved"}, "mesh.rest"),
    ],
)
def test_impossible_meshes(checkpoint, tmp_path, mesh, complaint):
    with pytest.raises(UserError) as refusal:
        Trainer(tiny_run(tmp_path, checkpoint, train__micro_batch=ROWS) | {"mesh": mesh})
    assert complaint in str(refusal.value)


def test_rows_of_a_batch_must_divide(trainers):
    batch = {key: value[:6] for key, value in next(batches()).items()}
    with pytest.raises(UserError, match="the batch has 6 rows; required: a multiple"):
        trainers["eight"].forward_backward(batch)
