"""Load an export of kimi_jax with the foreign libraries and compare logits.

    python tests/parity/check_exports.py --base DIR --export DIR --logits FILE.npz \
        --format {peft,peft-fused,merged-bf16,merged-int4} [--limit 1e-4]

FILE holds `tokens` [B, T], `logits` [B, T, V] in float32 and, if they are not 0, 1, …, `positions`
[B, T]. For a merged export they are the logits of the merged weights as stored. One line a check;
exit code 1 if one fails: a difference over the limit, a name missing or left over.
"""

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path

import adapters
import numpy as np
import reference
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM

INNER = f"base_model.model.{reference.WRAPPER}"  # adapters named after the multimodal checkpoint
ADAPTER = "adapter_model.safetensors"


class CheckFailedError(Exception):
    """What does not hold."""


def require_none(what, names):
    names = sorted(map(str, names))
    if names:
        shown = "; ".join(names[:5])
        raise CheckFailedError(f"{len(names)} {what}: {shown}")


def loaded(result):
    model, missing, unexpected = result
    require_none("missing names", missing)
    require_none("unexpected names", unexpected)
    return model


def adapter_folder(export, scratch):
    """The export, or a copy of it whose names are those of the text stack alone."""
    tensors = load_file(export / ADAPTER)
    require_none(
        "tensors that are not adapters", [name for name in tensors if ".lora_" not in name]
    )
    require_none(
        "tensors not in float32", [n for n in tensors if tensors[n].dtype != torch.float32]
    )
    if not all(name.startswith(INNER) for name in tensors):
        return export
    print("names carry the prefix language_model.; peft is given them without it")
    folder = Path(scratch) / "adapter"
    folder.mkdir()
    plain = {"base_model.model." + name.removeprefix(INNER): tensors[name] for name in tensors}
    save_file(plain, folder / ADAPTER, metadata={"format": "pt"})
    (folder / "adapter_config.json").write_bytes((export / "adapter_config.json").read_bytes())
    return folder


def peft_checks(base, export, scratch):
    """The per-expert adapter on per-expert modules as it is, and on fused experts."""
    folder = adapter_folder(export, scratch)
    yield (
        "peft, experts one by one",
        lambda: loaded(adapters.load(reference.load_model(base, per_expert=True), folder)),
    )
    experts = {n.split(".")[-3] for n in load_file(folder / ADAPTER) if ".mlp.experts." in n}
    if experts not in (set(), {"down_proj"}, set(adapters.MLP)):
        print("peft, transformers' fused experts: not checked, peft cannot fuse", *sorted(experts))
        return
    yield (
        "peft, transformers' fused experts",
        lambda: loaded(
            adapters.load(reference.load_model(base), folder, adapters.native_config(folder))
        ),
    )


def peft_fused_checks(base, export, scratch):
    """The fused adapter on transformers' own model, with the config in the export."""
    folder = adapter_folder(export, scratch)
    yield (
        "peft-fused, transformers' fused experts",
        lambda: loaded(adapters.load(reference.load_model(base), folder)),
    )


def described(tensors):
    """Name, shape and dtype of the text stack's tensors."""
    return {
        (name, tuple(tensor.shape), str(tensor.dtype))
        for name, tensor in tensors.items()
        if not name.startswith(reference.VISION)
    }


def check_inventory(base, export, packed):
    """The merged checkpoint has the base's tensors; unpacked ones as bf16 `.weight`."""
    expected = reference.read_tensors(base)
    if not packed:
        expected = reference.decompress(expected, reference.read_config(base)[0])
    before, after = described(expected), described(reference.read_tensors(export))
    require_none("tensors (name, shape, dtype) of the base missing", before - after)
    require_none("tensors (name, shape, dtype) that the base lacks", after - before)
    texts = reference.read_config(export)
    if not packed:
        require_none(
            "quantization_config left",
            {c["model_type"] for c in texts if "quantization_config" in c},
        )
    elif "quantization_config" not in texts[0]:
        raise CheckFailedError("config.json: quantization_config is gone")


def plain_copy(export, scratch):
    """A directory for transformers: the text stack under the model type that it has registered."""
    folder = Path(scratch) / "model"
    folder.mkdir()
    text, outer = reference.read_config(export)
    config = {key: value for key, value in text.items() if key != "auto_map"}
    config |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if outer is text:
        for file in export.glob("*.safetensors*"):
            (folder / file.name).symlink_to(file.resolve())
        return folder
    tensors = reference.read_tensors(export)
    plain = {
        name.removeprefix(reference.WRAPPER): tensor
        for name, tensor in tensors.items()
        if not name.startswith(reference.VISION)
    }
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def from_pretrained(folder):
    """transformers' own loading; experts unpacked at load come in bf16 and are widened after it."""
    model, info = DeepseekV3ForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    require_none("missing names", info["missing_keys"])
    require_none("unexpected names", info["unexpected_keys"])
    require_none("shapes that differ", info["mismatched_keys"])
    for parameter in model.parameters():  # model.float() refuses what was stored quantised
        parameter.data = parameter.data.float()
    return model.eval()


def merged_checks(base, export, scratch, packed):
    """A merged checkpoint by transformers' loader, and tensor by tensor into the same model."""
    label = "merged-int4" if packed else "merged-bf16"

    def whole():
        check_inventory(base, export, packed)
        return from_pretrained(plain_copy(export, scratch))

    yield f"{label}, from_pretrained", whole
    yield f"{label}, tensor by tensor", lambda: reference.load_model(export)


def checks(kind, base, export, scratch):
    """(name, function that loads a model) of each check of a format."""
    if kind == "peft":
        return peft_checks(base, export, scratch)
    if kind == "peft-fused":
        return peft_fused_checks(base, export, scratch)
    return merged_checks(base, export, scratch, packed=kind == "merged-int4")


def run(kind, base, export, expected, limit):
    """Prints a line a check; True if all hold."""
    passed = True
    with tempfile.TemporaryDirectory() as scratch:
        for name, load in checks(kind, base, export, scratch):
            try:
                logits = reference.logits(load(), expected["tokens"], expected.get("positions"))
            except (CheckFailedError, AssertionError, RuntimeError, ValueError, KeyError) as error:
                print(f"{name}: FAILED: {type(error).__name__}: {error}")
                passed = False
                continue
            if logits.shape != expected["logits"].shape:
                print(f"{name}: FAILED: {logits.shape} against {expected['logits'].shape}")
                passed = False
                continue
            difference = float(np.abs(logits - expected["logits"]).max())
            print(f"{name}: max abs difference {difference:.2e} (limit {limit:.0e})")
            passed &= difference <= limit  # a NaN fails
    return passed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="HF directory of the base")
    parser.add_argument("--export", type=Path, required=True, help="directory to check")
    formats = ["peft", "peft-fused", "merged-bf16", "merged-int4"]
    parser.add_argument("--format", choices=formats, required=True)
    parser.add_argument("--logits", type=Path, required=True, help="npz: tokens, logits")
    parser.add_argument("--limit", type=float, default=1e-4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # peft's are checked by their substance: names and logits
    with np.load(options.logits) as file:
        expected = dict(file)
    if not run(options.format, options.base, options.export, expected, options.limit):
        sys.exit(1)


if __name__ == "__main__":
    main()
