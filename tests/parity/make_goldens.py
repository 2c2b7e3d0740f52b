"""Write what the foreign libraries compute on the tiny checkpoints: see README.md for the keys.

    python tests/parity/make_goldens.py [--only logits,gradients,steps,int4]

Each golden is computed once more in float64, and the difference printed: the noise that the tests'
tolerances must cover.
"""

import argparse
import json
import shutil
from pathlib import Path

import adapters
import numpy as np
import reference
import routing
import steps
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
NAMES = ("k2_thinking", "k25", "moonlight")
FUSED_TOLERANCE = 1e-5  # per-expert modules against transformers' fused experts
SEED = 7


def save(name, **arrays):
    path = GOLDEN / name
    np.savez_compressed(path, **arrays)
    print(f"{name}: {path.stat().st_size} bytes")


def make_logits(name):
    """Logits, hidden states and routing at ordinary positions, and logits at far ones."""
    folder = GOLDEN / "checkpoints" / name
    model = reference.load_model(folder)
    rng = np.random.default_rng([SEED, len(name)])
    positions = np.tile(np.arange(24, dtype=np.int32), (2, 1))
    far = np.stack([np.r_[0:8, 40:48, 500:508], np.r_[1000:1012, 2036:2048]]).astype(np.int32)
    tokens = routing.clear_tokens(model, rng, positions)
    far_tokens = routing.clear_tokens(model, rng, far)
    with routing.recorded(model) as calls, torch.no_grad():
        output = reference.forward(model, tokens, positions, output_hidden_states=True)
    logits, far_logits = output.logits.numpy(), reference.logits(model, far_tokens, far)

    other = reference.load_model(folder, per_expert=True)
    wide = reference.load_model(folder).double()
    for batch, expected in [((tokens, positions), logits), ((far_tokens, far), far_logits)]:
        difference = np.abs(reference.logits(other, *batch) - expected).max()
        noise = np.abs(reference.logits(wide, *batch) - expected).max()
        print(f"{name}: per-expert against fused {difference:.1e}, fp64 against fp32 {noise:.1e}")
        assert difference <= FUSED_TOLERANCE

    shape = (*tokens.shape, -1)
    save(
        f"{name}_logits.npz",
        tokens=tokens,
        positions=positions,
        logits=logits,
        hidden_states=torch.stack(output.hidden_states).numpy(),
        router_indices=np.stack([i.reshape(shape).numpy() for *_, i in calls]).astype(np.int32),
        router_weights=np.stack([w.reshape(shape).numpy() for *_, w, _ in calls]),
        far_tokens=far_tokens,
        far_positions=far,
        far_logits=far_logits,
    )


def save_adapter(model, folder):
    """peft's own directory, without its model card, its lists of targets in order.

    `save_embedding_layers=False`: with lm_head among the targets peft would add the base's head.
    """
    if folder.exists():
        shutil.rmtree(folder)
    for config in model.peft_config.values():
        config.base_model_name_or_path = None
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    content = json.loads(settings.read_text(encoding="utf-8"))
    for key in ("target_modules", "target_parameters"):
        content[key] = content[key] and sorted(content[key])
    settings.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    weights.chmod(0o644)
    assert not [key for key in load_file(weights) if ".lora_" not in key]


def save_fused_adapter(name):
    """The adapter of `name` once more, as peft writes it for transformers' fused experts."""
    folder = GOLDEN / "adapters" / name
    model = reference.load_model(GOLDEN / "checkpoints" / name)
    model, missing, unexpected = adapters.load(model, folder, adapters.native_config(folder))
    assert not missing, missing
    assert not unexpected, unexpected
    save_adapter(model, folder.with_name(f"{name}_fused"))
    return model


def adapted_model(name):
    """The per-expert model of a checkpoint with filled adapters on every linear layer."""
    model = reference.load_model(GOLDEN / "checkpoints" / name, per_expert=True)
    model = adapters.attach(model)
    adapters.fill(model, SEED)
    return model


def gradient_error(wide, gradients):
    """The largest relative difference, in the 2-norm of a tensor, to a float64 model's gradients."""
    errors = []
    for key, parameter in adapters.trainable(wide).items():
        exact = parameter.grad.numpy()
        errors.append(np.linalg.norm(gradients[key] - exact) / np.linalg.norm(exact))
    return max(errors)


def make_gradients(name):
    """A filled peft adapter on every linear layer, the loss under it and its gradients."""
    model = adapted_model(name)
    rng = np.random.default_rng([SEED, len(name), 1])
    tokens = routing.clear_tokens(model, rng, np.tile(np.arange(24), (2, 1)))
    weights = steps.draw_weights(rng, tokens.shape)
    logits = reference.forward(model, tokens).logits
    total = adapters.loss_sum(logits, tokens, weights)
    loss = total / float(weights.sum())
    loss.backward()
    total, loss = total.detach(), loss.detach()
    gradients = {key: value.grad.numpy() for key, value in adapters.trainable(model).items()}
    zero = [key for key, value in gradients.items() if not value.any()]
    print(f"{name}: loss {float(loss):.4f}, {len(gradients)} gradients, {len(zero)} of them zero")
    assert not zero
    wide = adapted_model(name).double()
    wide_logits = reference.forward(wide, tokens).logits
    (adapters.loss_sum(wide_logits, tokens, weights) / float(weights.sum())).backward()
    print(f"{name}: gradients, fp32 against fp64 {gradient_error(wide, gradients):.1e}")
    save_adapter(model, GOLDEN / "adapters" / name)
    fused = reference.logits(save_fused_adapter(name), tokens)
    difference = np.abs(fused - logits.detach().numpy()).max()
    print(f"{name}: fused adapter against per-expert adapter {difference:.1e}")
    assert difference <= 1e-4
    save(
        f"{name}_gradients.npz",
        tokens=tokens,
        loss_weights=weights,
        logits=logits.detach().numpy(),
        loss_sum=total.numpy(),
        weight_sum=np.float32(weights.sum()),
        loss=loss.numpy(),
        **{f"grad/{key}": value for key, value in gradients.items()},
    )


def make_steps(name):
    """Twenty optimizer steps from the adapter that `make_gradients` saved."""
    rng = np.random.default_rng([SEED, len(name), 2])
    chosen = []

    def choose(step, model):
        while True:
            tokens, weights = steps.draw_batch(rng, model.config.vocab_size)
            with routing.recorded(model) as calls:
                reference.logits(model, tokens)
            if routing.margin(calls) > routing.MARGIN:
                chosen.append((tokens, weights))
                return tokens, weights

    losses, norms = steps.train(adapted_model(name), choose)
    wide_losses, _ = steps.train(adapted_model(name).double(), lambda step, _: chosen[step])
    print("losses", np.round(losses, 4), "norms", np.round(norms, 3), sep="\n")
    print(f"{name}: twenty losses, fp32 against fp64 {np.abs(losses - wide_losses).max():.1e}")
    save(
        f"{name}_steps.npz",
        tokens=np.stack([tokens for tokens, _ in chosen]),
        loss_weights=np.stack([weights for _, weights in chosen]),
        learning_rate=np.float64([steps.learning_rate(step) for step in range(steps.STEPS)]),
        loss=losses,
        grad_norm=norms,
    )


def make_int4():
    """Codes -8..7 and bf16 scales, the words and the weights that compressed-tensors makes."""
    rng = np.random.default_rng(SEED)
    codes = rng.integers(-8, 8, (48, 96), dtype=np.int8)
    codes[0, :16] = np.arange(-8, 8)
    scale = torch.from_numpy(np.exp(rng.normal(-4, 2, (48, 3)))).to(torch.bfloat16)
    packed = pack_to_int32(torch.from_numpy(codes), 4)
    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    weight = PackedQuantizationCompressor.decompress(
        {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.Size(codes.shape)},
        QuantizationScheme(targets=["Linear"], weights=args),
    )["weight"]
    assert weight.dtype == torch.bfloat16
    assert packed.dtype == torch.int32
    save(
        "int4_compressed_tensors.npz",
        codes=codes,
        scale=scale.view(torch.uint16).numpy(),
        packed=packed.numpy(),
        weight=weight.view(torch.uint16).numpy(),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="logits,gradients,steps,int4")
    wanted = parser.parse_args().only.split(",")
    torch.set_num_threads(1)
    if "int4" in wanted:
        make_int4()
    for name in NAMES:
        if "logits" in wanted:
            make_logits(name)
        if "gradients" in wanted:
            make_gradients(name)
    if "steps" in wanted:
        make_steps("k2_thinking")


if __name__ == "__main__":
    main()
