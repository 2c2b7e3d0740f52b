"""peft adapters on the foreign models: attach them by name, fill them, save and name them."""

import re
import zlib

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

ATTENTION = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 4, 8
EXPERT_RANK, EXPERT_ALPHA = 2, 6
EXPERT_PATTERN = r"experts\.\d+\.(gate|up|down)_proj"  # "shared_experts.up_proj" has no digit


def linear_names(model):
    """The last names of the linear layers that are adapted: all of them."""
    present = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    return sorted(present & {*ATTENTION, *MLP, "lm_head"})


def attach(model):
    """LoRA on every linear layer of a per-expert model; routed experts have their own rank."""
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=linear_names(model),
        rank_pattern={EXPERT_PATTERN: EXPERT_RANK},
        alpha_pattern={EXPERT_PATTERN: EXPERT_ALPHA},
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def trainable(model):
    """Adapter parameters by the names that peft writes, in sorted order."""
    found = {
        name.replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert all(".lora_" in name for name in found)
    return dict(sorted(found.items()))


def fill(model, seed):
    """Random factors: A of size one per input, B a tenth of the base layer's output size.

    B is not zero, as it is at a run's start, because A would then have no gradient.
    """
    bases = dict(model.named_modules())
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            key = zlib.crc32(name.encode())
            values = np.random.default_rng([seed, key]).standard_normal(parameter.shape)
            if ".lora_A." in name:
                values /= np.sqrt(parameter.shape[1])
            else:
                weight = bases[name.split(".lora_B.")[0]].base_layer.weight
                values *= 0.1 * float(weight.norm()) / np.sqrt(weight.shape[0])
            parameter.copy_(torch.from_numpy(values))


def loss_sum(logits, tokens, weights):
    """Sum of w · nll, float: the weight of a place is that of predicting the token at that place."""
    tokens = torch.as_tensor(tokens, dtype=torch.long)
    weights = torch.as_tensor(weights)
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    return (nll * weights[:, 1:].flatten()).sum()


def load(model, folder, config=None):
    """peft's model for an adapter directory, and what it reported missing and unexpected."""
    adapted = PeftModel.from_pretrained(model, folder, config=config)
    tensors = load_file(folder / "adapter_model.safetensors")
    result = set_peft_model_state_dict(adapted, tensors)
    missing = [name for name in result.missing_keys if "lora_" in name]
    return adapted.eval(), missing, list(result.unexpected_keys)


def native_config(folder):
    """A config that loads a per-expert adapter completely into transformers' fused experts.

    peft rewrites targets called gate_proj, up_proj, down_proj to the fused expert parameters and
    forgets shared and dense layers of that name. As `target_parameters` nothing is forgotten; the
    tensors' names stay as they are, and peft fuses the experts' factors by itself.
    """
    stored = LoraConfig.from_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    modules, parameters, ranks, alphas = set(), set(), {}, {}
    for name, tensor in tensors.items():
        if ".lora_A." not in name:
            continue
        layer = name.removeprefix("base_model.model.").split(".lora_A.")[0]
        leaf = layer.rsplit(".", 1)[-1]
        if leaf not in MLP:
            modules.add(leaf)
        elif ".experts." not in layer:
            parameters.add(re.sub(r".*(mlp\..*)", r"\1.weight", layer))
        else:
            fused, factor = ("down_proj", 1) if leaf == "down_proj" else ("gate_up_proj", 2)
            key = get_pattern_key(stored.alpha_pattern, layer)
            parameters.add(f"mlp.experts.{fused}")
            ranks[rf"mlp\.experts\.{fused}"] = factor * tensor.shape[0]
            alpha = stored.alpha_pattern.get(key, stored.lora_alpha)
            alphas[rf"mlp\.experts\.{fused}"] = factor * alpha
    stored.target_modules, stored.target_parameters = sorted(modules), sorted(parameters)
    stored.rank_pattern, stored.alpha_pattern = ranks, alphas
    return stored
