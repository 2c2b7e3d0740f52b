"""Export adapters in every format, with the logits that check_exports.py compares them with.

    python tests/parity/export_for_check.py OUT      # with kimi_jax
    parity-env/bin/python tests/parity/check_exports.py --base … --export … --format … --logits …

Runs in kimi_jax's own environment. OUT is new or empty. For each export NAME, OUT/NAME holds it and
OUT/NAME.npz the logits: of base and adapter for peft and peft-fused, of the merged checkpoint as read
back for merged-bf16 and merged-int4. OUT/checks.txt has the arguments of check_exports.py, a line a
check, for

    xargs -L 1 parity-env/bin/python tests/parity/check_exports.py < OUT/checks.txt
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from kimi_jax.config import LoraSection
from kimi_jax.lora import adapter_shapes, plan_adapters
from kimi_jax.model.layer import ModelSettings
from kimi_jax.model.transformer import ModelDef
from kimi_jax.weights.checkpoint import open_checkpoint
from kimi_jax.weights.export_hf import write_merged
from kimi_jax.weights.export_peft import write_peft
from kimi_jax.weights.import_peft import read_peft
from kimi_jax.weights.load import load_base

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
SEED = 11


def logits(checkpoint, plan, adapters, tokens):
    """float32 logits of a checkpoint with an adapter, or without one."""
    model = ModelDef(checkpoint.config, plan, ModelSettings(dtype=jnp.float32))
    values = {path: jnp.asarray(value) for path, value in adapters.items()}
    return np.asarray(model.bind(load_base(checkpoint), values)(tokens))


def random_adapter(checkpoint, **settings):
    """An adapter whose B is not zero."""
    section = LoraSection(rank=3, alpha=6.0, **settings)
    plan = plan_adapters(section, checkpoint.table)
    rng = np.random.default_rng(SEED)
    return plan, {
        path: (rng.standard_normal(shape) * shape[-1] ** -0.5 * 0.4).astype(np.float32)
        for path, shape in adapter_shapes(plan).items()
    }


def cases(checkpoint, name):
    """(label, formats, plan, factors): the golden adapter on everything, and what it does not cover."""
    adapters, merged = ["peft", "peft-fused"], ["merged-bf16"]
    if checkpoint.config.packed_experts:
        merged.append("merged-int4")
    golden = read_peft(GOLDEN / "adapters" / name, checkpoint.config, checkpoint.table)
    if checkpoint.config.prefix:
        # In the fused layout a wrapper's head has another prefix than the rest: check_exports.py takes
        # one away from all names.
        yield "all", ["peft", *merged], *golden
        plan = {path: adapter for path, adapter in golden[0].items() if path != "lm_head"}
        factors = {path: golden[1][path] for path in adapter_shapes(plan)}
        yield "no-head", ["peft-fused"], plan, factors
        return
    yield "all", adapters + merged, *golden
    shared = random_adapter(
        checkpoint,
        targets=("attention", "dense", "shared", "routed", "head"),
        expert_rank=2,
        expert_factors="shared",
    )
    yield "shared-factor", adapters + merged, *shared
    if name != "k2_thinking":
        return
    down = random_adapter(checkpoint, targets=("attention", "mlp.experts.down_proj"))
    yield "down-only", adapters, *down
    gate_up = random_adapter(
        checkpoint,
        targets=("o_proj", "shared", "mlp.experts.gate_proj", "mlp.experts.up_proj"),
        expert_alpha=4.0,
    )
    yield "gate-up-only", adapters, *gate_up
    yield (
        "no-experts",
        adapters,
        *random_adapter(checkpoint, targets=("attention", "shared", "dense")),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="new or empty directory")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        parser.error(f"{out} is not empty")
    lines = []
    for name in ("k2_thinking", "k25", "moonlight"):
        checkpoint = open_checkpoint(GOLDEN / "checkpoints" / name)
        with np.load(GOLDEN / f"{name}_gradients.npz") as golden:
            tokens = golden["tokens"]
        for label, forms, plan, adapters in cases(checkpoint, name):
            adapted = logits(checkpoint, plan, adapters, tokens)
            for form in forms:
                place = out / f"{name}-{label}-{form}"
                if form in ("peft", "peft-fused"):
                    write_peft(place, plan, checkpoint.config, adapters, name, form)
                    expected = adapted
                else:
                    write_merged(place, checkpoint, plan, adapters, form)
                    expected = logits(open_checkpoint(place), {}, {}, tokens)
                file = place.with_name(place.name + ".npz")
                np.savez(file, tokens=tokens, logits=expected)
                lines.append(
                    f"--base '{checkpoint.directory}' --export '{place}' --format {form} --logits '{file}'\n"
                )
    (out / "checks.txt").write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} exports in {out}")


if __name__ == "__main__":
    main()
