"""What people read: the table of what trains and what does not, and the line of a step."""

from collections.abc import Sequence

import numpy as np
from rich import box
from rich.table import Table

from kimi_jax.lora import Adapter, AdapterPlan
from kimi_jax.model.params import Weight
from kimi_jax.training.flops import flops_per_token, model_flops_utilisation, peak_memory
from kimi_jax.training.session import Session
from kimi_jax.training.step import StepMetrics

# fp32 master, gradient and two moments of AdamW.
BYTES_A_TRAINED_PARAMETER = 4 * 4


def trainable_table(table: Sequence[Weight], plan: AdapterPlan) -> Table:
    """One line for each kind of weight: its adapter, trained parameters and bytes, and the frozen base.

    A weight that dense and mixture-of-experts layers both have stands in one line.
    """
    view = Table(title="What trains", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("weight", "layers", "base", "adapter", "trained", "memory"):
        side = "left" if name in ("weight", "adapter") else "right"
        view.add_column(name, justify=side, no_wrap=True)
    rows: dict[str, list[Weight]] = {}
    for weight in table:
        rows.setdefault(weight.name, []).append(weight)
    all_trained = 0
    for name, weights in rows.items():
        adapters = [plan[weight.path] for weight in weights if weight.path in plan]
        trained = sum(adapter.parameters for adapter in adapters)
        all_trained += trained
        layers = sum(weight.layers for weight in weights)
        adapted = sum(adapter.weight.layers for adapter in adapters)
        view.add_row(
            name,
            str(layers),
            f"{_bytes(sum(weight.bytes for weight in weights))} {weights[0].storage}",
            _describe(adapters[0]) + (f" in {adapted}" if adapted < layers else "")
            if adapters
            else "frozen",
            f"{trained:,}" if trained else "–",
            _bytes(trained * BYTES_A_TRAINED_PARAMETER) if trained else "–",
        )
    parameters = sum(weight.parameters for weight in table)
    view.add_section()
    view.add_row(
        "all",
        "",
        _bytes(sum(weight.bytes for weight in table)),
        f"{all_trained / parameters:.2%} of {parameters:,}",
        f"{all_trained:,}",
        _bytes(all_trained * BYTES_A_TRAINED_PARAMETER),
    )
    view.caption = "memory: fp32 adapter, its gradient and two moments"
    return view


def _describe(adapter: Adapter) -> str:
    shared = ", one shared" if adapter.factors == "shared" else ""
    return f"rank {adapter.rank}, alpha {adapter.alpha:g}{shared}"


def record_step(
    session: Session,
    step: int,
    metrics: StepMetrics,
    batch: dict[str, np.ndarray],
    rate: float,
    seconds: float,
) -> None:
    """Writes and prints the line of update number `step`. Real tokens are counted, padding is not.

    Args:
        session: of the run.
        step: updates made with it; the trainer may be further by now.
        metrics: on the host.
        batch: its micro-batches.
        rate: its learning rate.
        seconds: that it took.
    """
    trainer = session.trainer
    tokens = int((batch["segment_ids"] > 0).sum())
    load = np.asarray(metrics.expert_load, np.float64)
    memory, whose = peak_memory()
    devices = session.config.mesh.expert * session.config.mesh.data
    flops = flops_per_token(trainer.checkpoint.table, trainer.checkpoint.config)
    line = {
        "loss": float(metrics.loss),
        "grad_norm": float(metrics.grad_norm),
        "learning_rate": rate,
        "tokens": tokens,
        "trained_weight": float(metrics.weight_sum),
        "tokens_per_second": tokens / seconds,
        "mfu_4n": model_flops_utilisation(tokens / seconds, flops, devices),
        f"peak_{whose}_memory": memory,
        "expert_load_max_over_mean": float((load.max(1) / load.mean(1)).max())
        if load.size
        else None,
        "seconds": seconds,
    }
    session.metrics.write("step", step, **line)
    mfu = f" · MFU (4N) {line['mfu_4n']:.1%}" if line["mfu_4n"] is not None else ""
    session.console.print(
        f"step {step} · loss {line['loss']:.4f} · grad norm {line['grad_norm']:.3f} · "
        f"lr {rate:.2e} · {line['tokens_per_second']:,.0f} tokens/s{mfu} · "
        f"{memory / 2**30:.2f} GiB {whose} · load {line['expert_load_max_over_mean'] or 0:.1f}×",
        highlight=False,
        soft_wrap=True,
    )


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"
