"""transformers with peft: K2-Thinking's sizes, LoRA on every linear layer, bf16 experts: its fastest case.

A model of one dense layer and a head, with or without a mixture-of-experts layer more; the difference
is that layer. No gradient checkpointing, adapters in bf16, as nothing else is faster.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports]

from tools.peer_benches.case import SCALE, Case, sizes_of, useful_operations
from tools.peer_benches.torch_layer import BACKENDS, allow_only
from tools.peer_benches.torch_timing import first_line, timed, timed_with_peak, versions
from tools.peer_benches.transformers_config import hf_config

MODULES = (
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj", "lm_head"),
)
PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
FLASH_PACKAGE, FLASH = "flash_attn", "flash_attention_2"
AS_CHOSEN = "sdpa, as PyTorch chooses"


def measure(case: Case) -> dict[str, Any]:
    """Times one model."""
    config = json.loads((Path(case.config) / "config.json").read_text(encoding="utf-8"))
    sizes = sizes_of(config)
    torch.manual_seed(0)
    model = build(case, config, "cuda")
    loads = see_loads(model, case, config["vocab_size"], sizes.n_routed_experts)
    tokens = torch.randint(config["vocab_size"], (case.batch, case.length), device="cuda")
    called = torch.compile(model) if case.compiled else model
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        for leaf in trained:
            leaf.grad = None
        called(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    attention, tried = case.attention, {}
    if attention is None:
        attention, tried = _fastest(model, step)
    use(model, attention)
    assignments = case.moe_layers * case.tokens * sizes.num_experts_per_tok
    took, peak = timed_with_peak(step, case.calls)
    return {
        "ms": took,
        "peak_gib": peak,
        "operations": useful_operations(sizes, case.tokens, assignments),
        "loads": loads,
        "assignments": assignments,
        "how": f"{'compiled' if case.compiled else 'eager'}; attention: {attention}",
        "attention": attention,
        "attention_ms": tried,
        "trained_parameters": sum(p.numel() for p in trained),
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
    }


def build(case: Case, config: dict[str, Any], device: str) -> Any:
    """The model with its adapters, random.

    Raises:
        AssertionError: peft left a linear layer or the experts without an adapter.
    """
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]
    from transformers import DeepseekV3ForCausalLM  # pyright: ignore[reportMissingImports]

    layers = {"num_hidden_layers": 1 + case.moe_layers, "first_k_dense_replace": 1}
    foreign = hf_config(config, attention="sdpa", experts="grouped_mm", **layers)
    with torch.device(device):
        model: Any = DeepseekV3ForCausalLM._from_config(
            foreign,
            attn_implementation="sdpa",
            experts_implementation="grouped_mm",
            dtype=torch.bfloat16,
        )
    lora = LoraConfig(
        r=case.rank,
        lora_alpha=int(SCALE * case.rank),
        lora_dropout=0.0,
        target_modules=list(MODULES),
        target_parameters=list(PARAMETERS) if case.moe_layers else None,
        init_lora_weights=False,  # zeros would be a special case
        task_type="CAUSAL_LM",
    )
    # For a model type that it knows, peft would turn `gate_proj` into the routed experts' and leave
    # the dense and shared layers of that name without an adapter.
    model_type, model.config.model_type = model.config.model_type, "a type that peft does not know"
    model = get_peft_model(model, lora, autocast_adapter_dtype=False).train()
    model.get_base_model().config.model_type = model_type
    _check_adapted(model, case)
    return model


def _check_adapted(model: Any, case: Case) -> None:
    adapted = [name for name, _ in model.named_modules() if name.endswith(".lora_A")]
    # Attention has five linear layers, a dense or shared SwiGLU three, routed experts two; one head.
    wanted = (5 + 3) + case.moe_layers * (5 + 3 + 2) + 1
    assert len(adapted) == wanted, f"peft adapted {len(adapted)} of {wanted}: {adapted}"
    kinds = {p.dtype for p in model.parameters() if p.requires_grad}
    assert kinds == {torch.bfloat16}, f"adapters are {kinds}"


def see_loads(model: Any, case: Case, vocabulary: int, experts: int) -> tuple[int, ...] | None:
    """Assignments by expert in a forward pass; None without such a layer."""
    found = []

    def look(_: Any, arguments: tuple[Any, ...]) -> None:
        found.extend(v for v in arguments if v.dtype in (torch.int64, torch.int32))

    hooks = [
        module.register_forward_pre_hook(look)
        for module in model.modules()
        if type(module).__name__ == "DeepseekV3Experts"
    ]
    device = next(model.parameters()).device
    tokens = torch.randint(vocabulary, (case.batch, case.length), device=device)
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    if not found:
        return None
    return tuple(torch.bincount(found[0].flatten(), minlength=experts).tolist())


def _candidates() -> list[str]:
    fused = [name for name in BACKENDS if name != "math"]
    packages = [FLASH] if importlib.util.find_spec(FLASH_PACKAGE) else []
    return [AS_CHOSEN, *(f"sdpa, {name}" for name in fused), *packages]


def use(model: Any, attention: str) -> None:
    """Chooses an attention by its name among the candidates."""
    if attention == FLASH:
        model.get_base_model().set_attn_implementation(FLASH)
    elif attention == AS_CHOSEN:
        for name in BACKENDS:
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(True)
    else:
        allow_only(attention.removeprefix("sdpa, "))


def _fastest(model: Any, step: Any) -> tuple[str, dict[str, Any]]:
    tried: dict[str, Any] = {}
    for name in _candidates():
        use(model, name)
        try:
            tried[name] = timed(step, 3)
        except RuntimeError as error:
            tried[name] = first_line(error)
        finally:
            if name == FLASH:
                model.get_base_model().set_attn_implementation("sdpa")
    times = {name: took for name, took in tried.items() if isinstance(took, float)}
    assert times, f"none of the attentions works here: {tried}"
    return min(times, key=lambda name: times[name]), tried
