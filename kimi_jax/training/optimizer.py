"""AdamW with a learning-rate schedule and clipping by the global norm, all from optax."""

import optax

from kimi_jax.config import TrainSection


def learning_rates(settings: TrainSection) -> optax.Schedule:
    """Learning rate of update s = 0, 1, …: (s + 1) / warm-up of the peak, then the schedule.

    A linear or cosine schedule falls from the peak, at the end of the warm-up, to
    `final_learning_rate_fraction` of it at `steps`.
    """
    peak, warmup = settings.learning_rate, settings.warmup_steps
    remaining = settings.steps - warmup
    match settings.schedule:
        case "constant":
            after = optax.constant_schedule(peak)
        case "linear":
            after = optax.linear_schedule(
                peak, peak * settings.final_learning_rate_fraction, remaining
            )
        case "cosine":
            after = optax.cosine_decay_schedule(
                peak, remaining, settings.final_learning_rate_fraction
            )
    if not warmup:
        return after
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(
    settings: TrainSection, rates: optax.Schedule | None = None
) -> optax.GradientTransformation:
    """Clipping (if asked for), then AdamW with decoupled weight decay (arXiv:1711.05101).

    Moments have the adapters' dtype, fp32.

    Args:
        settings: numbers and schedule.
        rates: a schedule in place of theirs; the state has the same form.
    """
    adamw = optax.adamw(
        rates or learning_rates(settings),
        b1=settings.beta1,
        b2=settings.beta2,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
    if settings.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw)
