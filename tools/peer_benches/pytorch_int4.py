"""The strongest route of PyTorch: packed experts decoded to bf16, `torch._grouped_mm`, split LoRA.

One layer, forward and backward. Nothing is recomputed but the decoded weights, which is what a layer
by itself allows; `recomputed` says what it costs with the whole layer recomputed, as a deep model needs.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportMissingImports]

from tools.peer_benches.case import Case, Sizes, assignments_here, sizes_of, useful_operations
from tools.peer_benches.torch_check import check_kernels, check_layer
from tools.peer_benches.torch_layer import ATTENTIONS, Layer, allow_only, attend
from tools.peer_benches.torch_timing import first_line, timed, timed_with_peak, versions
from tools.peer_benches.torch_weights import chosen_experts, random_adapters, random_weights

KERNEL_TOLERANCE = 1e-2  # one bf16 rounding


def measure(case: Case) -> dict[str, Any]:
    """Checks the layer at a small size, then times it at the case's.

    Raises:
        AssertionError: its results are not those of transformers' layer.
    """
    config = json.loads((Path(case.config) / "config.json").read_text(encoding="utf-8"))
    sizes = sizes_of(config)
    torch.manual_seed(0)
    attention, tried = fastest_attention(case, sizes)
    checked = check(config, case, attention)
    layer = _make_layer(case, config, sizes, attention)
    x = torch.randn(case.batch, case.length, sizes.hidden_size, device="cuda").bfloat16()
    x.requires_grad_()
    dy = torch.randn_like(x)
    if layer.chosen is None:
        layer.chosen = _settled_choice(layer, x)
    loads = _loads(layer.chosen, sizes)
    layer.rows_here = assignments_here(loads, case.ranks)
    leaves = [x, *layer.adapters.values()]

    def step(forward: Callable[[Any], Any] = layer) -> None:
        for leaf in leaves:
            leaf.grad = None
        forward(x).backward(dy)

    variants: dict[str, Any] = {"eager": timed_with_peak(step, case.calls)}
    layer.use_compiled()
    try:
        variants["compiled"] = timed_with_peak(step, case.calls)
    except Exception as error:  # the eager figure stands, and the table says why
        variants["compiled"] = first_line(error)
    figures = {name: figure for name, figure in variants.items() if not isinstance(figure, str)}
    best = min(figures, key=lambda name: figures[name][0])
    if best == "eager":
        layer.use_eager()
    again = timed_with_peak(
        lambda: step(lambda v: checkpoint(layer, v, use_reentrant=False)), case.calls
    )
    return {
        "ms": figures[best][0],
        "peak_gib": figures[best][1],
        "operations": useful_operations(sizes, case.tokens, layer.rows_here),
        "loads": loads,
        "assignments": layer.rows_here,
        "recomputed": {"ms": again[0], "peak_gib": again[1]},
        "how": f"{best}; attention: {attention}",
        "variants": variants,
        "attention_ms": tried,
        "checked": checked,
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
    }


def fastest_attention(case: Case, sizes: Sizes) -> tuple[str, dict[str, Any]]:
    """Which of PyTorch's attentions to use, and what each took forward and backward, or why it cannot."""
    shape = (case.batch, sizes.num_attention_heads, case.length)
    widths = (sizes.qk_head_dim, sizes.qk_head_dim, sizes.v_head_dim)
    heads = [torch.randn(*shape, w, device="cuda").bfloat16().requires_grad_() for w in widths]
    tried: dict[str, Any] = {}
    for name, (backend, padded) in ATTENTIONS.items():
        if backend == "math":
            continue  # forms all scores
        allow_only(backend)

        def step(padded: bool = padded) -> None:
            q, k, v = heads
            out = attend(q, k, v, 0.1, padded)
            out.backward(out.detach())

        try:
            tried[name] = timed(step, 3)
        except RuntimeError as error:
            tried[name] = first_line(error)
    times = {name: took for name, took in tried.items() if isinstance(took, float)}
    assert times, f"none of PyTorch's attentions works here: {tried}"
    best = min(times, key=lambda name: times[name])
    allow_only(ATTENTIONS[best][0])
    return best, tried


def check(config: dict[str, Any], case: Case, attention: str) -> dict[str, Any]:
    """Compares kernels with their plain forms and the layer with transformers'."""
    errors = check_kernels("cuda")
    assert errors["decode"] == 0, f"decoding is not exact: {errors}"
    assert max(errors.values()) < KERNEL_TOLERANCE, f"kernels: {errors}"
    padded = ATTENTIONS[attention][1]
    found = {
        ranks: check_layer(config, "cuda", torch.bfloat16, ranks, padded=padded)
        for ranks in sorted({1, 4 if case.ranks > 1 else 1})
    }
    assert all(each.passed for each in found.values()), f"not transformers' layer: {found}"
    return {str(ranks): f"{each.error:.4f} ({each.of})" for ranks, each in found.items()}


def _make_layer(case: Case, config: dict[str, Any], sizes: Sizes, attention: str) -> Layer:
    weights = random_weights(sizes, case.ranks, "cuda")
    adapters = random_adapters(sizes, case.ranks, case.rank, "cuda")
    layer = Layer(config, sizes, weights, adapters, case.length, case.ranks)
    layer.padded = ATTENTIONS[attention][1]
    if case.loads is not None:
        layer.chosen = chosen_experts(case.loads, case.tokens).cuda()
    return layer


def _settled_choice(layer: Layer, x: Any) -> Any:
    """The experts that the layer's own router chooses, once and for all calls."""
    with torch.no_grad():
        layer(x)
    return layer.routed_to


def _loads(chosen: Any, sizes: Sizes) -> tuple[int, ...]:
    return tuple(torch.bincount(chosen.flatten(), minlength=sizes.n_routed_experts).tolist())
