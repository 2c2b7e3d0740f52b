"""Every exchange of data in the compiled step on eight devices, and what must not be among them."""

import math
from collections import defaultdict

import jax
import pytest

from kimi_jax.config_file import load_config
from kimi_jax.model.config import parse_model_config
from kimi_jax.model.layout import base_arrays
from kimi_jax.model.params import weight_table
from kimi_jax.parallel.ranks import make_ranks
from kimi_jax.parallel.sharding import local_shape
from kimi_jax.planning.hlo import collectives, results
from kimi_jax.training.absent import abstract_step
from tests.unit.support import tiny_config, tiny_run

RANKS, LENGTH, CHUNK, RANK = 8, 20, 8, 3
# No two of these sizes, nor those of adapters, are alike: a shape tells whose it is.
SIZES = {
    "hidden_size": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "moe_intermediate_size": 128,
    "intermediate_size": 144,
    "vocab_size": 320,
    "q_lora_rank": 40,
    "kv_lora_rank": 32,
}
ROWS = RANKS * LENGTH  # of all ranks
PARTS = {  # rows of a layer's matrices, of which each rank stores an eighth and gathers the rest
    "q_a_proj": (40, 64),
    "q_b_proj": (48, 40),
    "kv_a_proj_with_mqa": (40, 64),
    "kv_b_proj": (56, 32),
    "o_proj": (64, 24),
    "gate_proj and up_proj, dense": (144, 64),
    "down_proj, dense": (64, 144),
    "gate_proj and up_proj, shared": (128, 64),
    "down_proj, shared": (64, 128),
    "router": (16, 64),
}
GATHERED = {
    **{name: {shape} for name, shape in PARTS.items()},
    "rows to the experts, and cotangents to them": {(ROWS, 64)},
    "chosen experts and their weights, and the weights' cotangents": {(ROWS, 2)},
    "ids to the embedding": {(ROWS,)},
    "hidden states, targets and loss weights of a chunk": {
        (RANKS * CHUNK, 64),
        (RANKS * CHUNK,),
    },
}
SCATTERED = {
    "rows from the experts and the embedding": {(LENGTH, 64)},
    "cotangents of routing weights": {(LENGTH, 2)},
    "cotangents of a chunk's hidden states": {(CHUNK, 64)},
}


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """Configuration, architecture, ranks, and the compiled step's text."""
    changes = {"mesh__expert": RANKS, "lora__rank": RANK, "train__micro_batch": RANKS}
    changes |= {"train__sequence_length": LENGTH, "train__loss_chunk": CHUNK}
    config = load_config(tiny_run(tmp_path_factory.mktemp("run"), "none", **changes))
    model = parse_model_config(tiny_config(**SIZES))
    ranks = make_ranks(config.mesh, jax.devices()[:RANKS])
    function, arguments = abstract_step(config, model, ranks)
    quickly = {"xla_backend_optimization_level": 0}
    return model, ranks, function.lower(*arguments).compile(compiler_options=quickly).as_text()


@pytest.fixture(scope="module")
def exchanges(step):
    found = defaultdict(set)
    for one in collectives(step[2]):
        found[one.kind] |= {array.shape for array in one.result}
    return found


def test_what_is_gathered(exchanges):
    assert exchanges["all-gather"] == set().union(*GATHERED.values())


def test_what_is_scattered(exchanges):
    assert exchanges["reduce-scatter"] == set().union(*SCATTERED.values())


def test_nothing_else_travels(exchanges):
    assert set(exchanges) == {"all-gather", "reduce-scatter", "all-reduce"}


def test_no_gradient_of_a_base_weight(step, exchanges):
    """What is added over ranks: adapters that all have, sums and statistics; never a weight's shape."""
    model, ranks, _ = step
    matrices = set()
    for array in base_arrays(weight_table(model), ranks).values():
        if len(array.weight.shape) > 1:
            local = local_shape(array.path, array.shape, array.spec, ranks.mesh_shape)
            for shape in (array.shape, local):
                matrices |= {shape, shape[1:]} if array.weight.stack else {shape}
    assert exchanges["all-reduce"] & matrices == set()
    assert exchanges["reduce-scatter"] & matrices == set()
    largest = RANK * 2 * max(SIZES.values())  # two layers of the largest adapter
    for shape in exchanges["all-reduce"]:
        assert len(shape) < 2 or RANK in shape or shape == (2, 16), shape
        assert math.prod(shape) <= largest, shape


def test_experts_stay_packed_in_their_stack(step):
    """No floating array is as large as a stack of experts: neither decoded weights nor a gradient.

    This compiler knows no 4-bit integers and widens a stack to 8 bits where it stands; that the GPU's
    leaves it alone is looked at in test_compile_absent.
    """
    found = results(step[2])
    for stack in ((2, 2, 128, 64), (2, 2, 64, 128)):
        kinds = {array.dtype for _, array in found if array.shape == stack}
        assert kinds <= {"s4", "s8"}
