"""Triton kernels of the PyTorch route: decoding int4, moving rows, and what stands between projections.

Each has a plain form in `torch_operations`, with which it is compared.
"""

import torch  # pyright: ignore[reportMissingImports]
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

WORDS = 1024  # that one program decodes
COLUMNS = 1024  # that one program sums


@triton.jit
def _decode(words, scale, out, count, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    word = tl.load(words + at, mask=inside, other=0)
    # A row's groups of 32 are four words, and rows are whole groups: flat indices suffice.
    factor = tl.load(scale + at // 4, mask=inside, other=0.0).to(tl.float32)
    nibble = tl.arange(0, 8)
    code = ((word[:, None] >> (4 * nibble)[None, :]) & 0xF) - 8
    value = (code.to(tl.float32) * factor[:, None]).to(tl.bfloat16)
    tl.store(out + at[:, None] * 8 + nibble[None, :], value, mask=inside[:, None])


@triton.jit
def _gather_sum(rows, places, out, width, K: tl.constexpr, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(K):
        place = tl.load(places + row * K + k).to(tl.int64)
        part = tl.load(rows + place * width + column, mask=inside & (place >= 0), other=0.0)
        total += part.to(tl.float32)
    tl.store(out + row * width + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu(both, weight, out, width, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    start = both + row * 2 * width
    gate = tl.load(start + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + width + column, mask=inside, other=0.0).to(tl.float32)
    hidden = gate * tl.sigmoid(gate) * up * tl.load(weight + row)
    tl.store(out + row * width + column, hidden.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_gradient(both, weight, d_out, d_both, d_weight, width, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    start, d_start = both + row * 2 * width, d_both + row * 2 * width
    gate = tl.load(start + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + width + column, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(d_out + row * width + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(d_weight + row, tl.sum(dy * silu * up, axis=0))
    dy *= tl.load(weight + row)
    d_gate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    kind = d_both.dtype.element_ty
    tl.store(d_start + column, d_gate.to(kind), mask=inside)
    tl.store(d_start + width + column, (dy * silu).to(kind), mask=inside)


def decode(words: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int32 words [E, out, in/8] and bf16 scales [E, out, in/32] to bf16 [E, out, in]."""
    out = words.new_empty((*words.shape[:-1], words.shape[-1] * 8), dtype=torch.bfloat16)
    count = words.numel()
    _decode[(triton.cdiv(count, WORDS),)](words, scale, out, count, BLOCK=WORDS)  # pyright: ignore[reportIndexIssue]
    return out


def gather_sum(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Σ over k of rows[places[:, k]], summed in fp32; places below 0 count for nothing."""
    count, k = places.shape
    width = rows.shape[1]
    out = rows.new_empty(count, width)
    grid = (count, triton.cdiv(width, COLUMNS))
    _gather_sum[grid](rows, places, out, width, K=k, BLOCK=COLUMNS)  # pyright: ignore[reportIndexIssue]
    return out


def swiglu(both: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up · weight of rows [gate | up] and fp32 weights."""
    rows, width = both.shape[0], both.shape[1] // 2
    out = both.new_empty(rows, width)
    _swiglu[(rows,)](both, weight, out, width, BLOCK=triton.next_power_of_2(width))  # pyright: ignore[reportIndexIssue]
    return out


def swiglu_gradient(
    both: torch.Tensor, weight: torch.Tensor, d_out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `swiglu`'s two arguments."""
    width = d_out.shape[1]
    d_both, d_weight = torch.empty_like(both), torch.empty_like(weight)
    block = triton.next_power_of_2(width)
    _swiglu_gradient[(len(both),)](both, weight, d_out, d_both, d_weight, width, BLOCK=block)  # pyright: ignore[reportIndexIssue]
    return d_both, d_weight
