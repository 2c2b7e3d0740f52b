"""The train step: pure functions of adapters, optimizer state, base and batch.

The base is an argument that is not differentiated. Micro-batches are accumulated inside the step, by
each rank for its own rows; the ranks' sums are added once, and meet their common denominator once,
before the update.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from kimi_jax.kernels.hopper import compiler_options
from kimi_jax.model.config import ModelConfig
from kimi_jax.model.transformer import ModelDef
from kimi_jax.parallel.ranks import MICRO_BATCHES, ONE_DEVICE, REPLICATED, Ranks
from kimi_jax.training.loss import LossTerms, loss_terms

Tree = dict[str, Array]


class TrainState(NamedTuple):
    """What training changes: fp32 adapters, the optimizer's state, and the number of updates made."""

    adapters: Tree
    opt_state: Any
    step: Array


class Gradients(NamedTuple):
    """Sums over micro-batches: Σ d loss_sum / d adapter, and the terms of the loss."""

    sums: Tree
    terms: LossTerms


class StepMetrics(NamedTuple):
    """Of one update: the mean loss before it, the gradient's norm before clipping, and more."""

    loss: Array
    weight_sum: Array
    grad_norm: Array
    expert_load: Array
    finite: Array


def init_state(
    adapters: Mapping[str, Array],
    optimizer: optax.GradientTransformation,
    ranks: Ranks = ONE_DEVICE,
) -> TrainState:
    """The state before the first update; moments live where their adapters do."""
    copied = {path: jnp.array(value) for path, value in adapters.items()}
    state = TrainState(copied, optimizer.init(copied), jnp.zeros((), jnp.int32))
    # Counters belong to no array that would say where they live.
    return jax.tree.map(lambda leaf: leaf if leaf.ndim else ranks.put(leaf, REPLICATED), state)


def make_gradients(
    model_def: ModelDef, chunk: int
) -> Callable[[Tree, Mapping[str, Array], Mapping[str, Array]], Gradients]:
    """`(adapters, base, batch [micro-batches, B, T]) -> Gradients` of all of them. Not jitted."""
    ranks = model_def.settings.ranks

    def loss(adapters: Tree, base: Any, batch: Any) -> tuple[Array, LossTerms]:
        terms = loss_terms(model_def.bind(base, adapters), batch, chunk)
        return terms.loss_sum, terms

    def gradients(adapters: Tree, base: Any, batch: Any) -> Gradients:
        def of(micro_batch: Any) -> Gradients:
            (_, terms), sums = jax.value_and_grad(loss, has_aux=True)(adapters, base, micro_batch)
            return Gradients(sums, terms)

        def add(total: Gradients, micro_batch: Any) -> tuple[Gradients, None]:
            return jax.tree.map(jnp.add, total, of(micro_batch)), None

        if len(batch["tokens"]) == 1:  # no second set of gradients to add to
            mine = of({field: values[0] for field, values in batch.items()})
        else:
            mine, _ = jax.lax.scan(add, no_gradients(model_def.config, adapters), batch)
        sums = {
            path: ranks.sum_where_replicated(value, model_def.adapter_specs[path])
            for path, value in mine.sums.items()
        }
        terms = (ranks.sum_where_replicated(term, REPLICATED) for term in mine.terms)
        return Gradients(sums, LossTerms(*terms))

    return ranks.run(
        gradients,
        (model_def.adapter_specs, model_def.base_specs, MICRO_BATCHES),
        Gradients._make((model_def.adapter_specs, REPLICATED)),
    )


def make_loss(
    model_def: ModelDef, chunk: int
) -> Callable[[Tree, Mapping[str, Array], Mapping[str, Array]], LossTerms]:
    """`(adapters, base, batch [micro-batches, B, T]) -> LossTerms` of all of them. Not jitted."""
    ranks = model_def.settings.ranks

    def losses(adapters: Tree, base: Any, batch: Any) -> LossTerms:
        model = model_def.bind(base, adapters)
        terms = jax.lax.map(lambda micro_batch: loss_terms(model, micro_batch, chunk), batch)
        return LossTerms(
            *(ranks.sum_where_replicated(term.sum(axis=0), REPLICATED) for term in terms)
        )

    return ranks.run(
        losses,
        (model_def.adapter_specs, model_def.base_specs, MICRO_BATCHES),
        REPLICATED,
    )


def no_gradients(config: ModelConfig, adapters: Mapping[str, Array]) -> Gradients:
    """Those of no micro-batch at all: zeros of the shapes that `make_gradients` gives."""
    loads = jnp.zeros((config.num_moe_layers, config.n_routed_experts), jnp.int32)
    terms = LossTerms(jnp.zeros(()), jnp.zeros(()), loads)
    return Gradients(jax.tree.map(jnp.zeros_like, dict(adapters)), terms)


def make_update(
    optimizer: optax.GradientTransformation,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """`(state, accumulated gradients, after=True) -> (state, metrics)`. Not jitted.

    If the loss or the gradient is not finite, the state comes back as it was, to be looked at; so it
    does if `after`, the `finite` of the update before, is false, and `finite` is then false too.
    """

    def update(
        state: TrainState, gradients: Gradients, after: Array | bool = True
    ) -> tuple[TrainState, StepMetrics]:
        terms = gradients.terms
        means = jax.tree.map(lambda g: g / terms.weight_sum, gradients.sums)
        grad_norm = optax.tree.norm(means)
        loss = terms.loss_sum / terms.weight_sum
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & after
        updates, opt_state = optimizer.update(means, state.opt_state, state.adapters)
        changed = TrainState(
            cast(Tree, optax.apply_updates(state.adapters, updates)), opt_state, state.step + 1
        )
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, state)
        return kept, StepMetrics(loss, terms.weight_sum, grad_norm, terms.expert_load, finite)

    return update


def make_train_step(
    model_def: ModelDef, optimizer: optax.GradientTransformation, chunk: int
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """`(state, base, batch [micro-batches, B, T], after=True) -> (state, metrics)`: jitted.

    The state is donated. `after` (bool scalar) is the `finite` of the step before, which need not be
    known when this one is dispatched: a step behind one that was not finite changes nothing either.
    """
    gradients, update = make_gradients(model_def, chunk), make_update(optimizer)

    def step(
        state: TrainState, base: Any, batch: Any, after: Array | bool = True
    ) -> tuple[TrainState, StepMetrics]:
        return update(state, gradients(state.adapters, base, batch), after)

    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options())
