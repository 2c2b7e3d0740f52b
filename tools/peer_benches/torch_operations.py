"""The differentiable operations of the PyTorch route; frozen weights get no gradient.

On a GPU the Triton kernels are used; on a CPU, where they are only checked, the plain forms.
"""

from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import Tensor  # pyright: ignore[reportMissingImports]


def plain_decode(words: Tensor, scale: Tensor) -> Tensor:
    """See `triton_kernels.decode`."""
    nibbles = (words[..., None] >> (4 * torch.arange(8, device=words.device))) & 0xF
    codes = (nibbles - 8).flatten(-2).float()
    return (codes * scale.float().repeat_interleave(32, dim=-1)).bfloat16()


def plain_gather_sum(rows: Tensor, places: Tensor) -> Tensor:
    """See `triton_kernels.gather_sum`."""
    found = rows[places.clamp(min=0).long()].float() * (places >= 0)[..., None]
    return found.sum(dim=1).to(rows.dtype)


def plain_swiglu(both: Tensor, weight: Tensor) -> Tensor:
    """See `triton_kernels.swiglu`."""
    gate, up = both.float().chunk(2, dim=-1)
    return (F.silu(gate) * up * weight[:, None]).to(both.dtype)


def plain_swiglu_gradient(both: Tensor, weight: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    """See `triton_kernels.swiglu_gradient`."""
    with torch.enable_grad():
        both, weight = both.detach().requires_grad_(), weight.detach().requires_grad_()
        return torch.autograd.grad(plain_swiglu(both, weight), (both, weight), d_out)


def kernels(x: Tensor) -> Any:
    """A namespace of decode, gather_sum, swiglu and swiglu_gradient for where `x` is."""
    if x.is_cuda:
        from tools.peer_benches import triton_kernels

        return triton_kernels
    return _Plain


class _Plain:
    decode = staticmethod(plain_decode)
    gather_sum = staticmethod(plain_gather_sum)
    swiglu = staticmethod(plain_swiglu)
    swiglu_gradient = staticmethod(plain_swiglu_gradient)


class _ExpertProjection(torch.autograd.Function):
    """Rows sorted by expert times decoded weights, plus the split adapter of each expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, words: Tensor, scale: Tensor, *rest: Any) -> Tensor:
        a, b, ends, factor = rest
        weight = kernels(x).decode(words, scale).to(x.dtype)
        y = torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)
        del weight  # its memory serves the next projection
        low = torch._grouped_mm(x, a.transpose(1, 2), offs=ends)
        y.add_(torch._grouped_mm(low, b.transpose(1, 2), offs=ends), alpha=factor)
        ctx.save_for_backward(x, words, scale, a, b, ends, low)
        ctx.factor = factor
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, words, scale, a, b, ends, low = ctx.saved_tensors
        dy = gradients[0].contiguous()
        weight = kernels(x).decode(words, scale).to(x.dtype)
        dx = torch._grouped_mm(dy, weight, offs=ends)
        del weight
        d_low = torch._grouped_mm(dy, b, offs=ends).mul_(ctx.factor)
        dx.add_(torch._grouped_mm(d_low, a, offs=ends))
        da = torch._grouped_mm(d_low.t(), x, offs=ends)
        db = torch._grouped_mm(dy.t(), low, offs=ends).mul_(ctx.factor)
        return dx, None, None, da, db, None, None


class _Linear(torch.autograd.Function):
    """A frozen matrix and its adapter, added by the matmul's own epilogue."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, factor: float) -> Tensor:
        y, low = x @ weight.t(), x @ a.t()
        y.addmm_(low, b.t(), alpha=factor)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.factor = factor
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        dy = gradients[0].contiguous()
        d_low = (dy @ b).mul_(ctx.factor)
        dx = dy @ weight
        dx.addmm_(d_low, a)
        return dx, None, d_low.t() @ x, (dy.t() @ low).mul_(ctx.factor), None


class _Dispatch(torch.autograd.Function):
    """Each assignment's row; its derivative sums over a row's assignments."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, row_of: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, row_of)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (places,) = ctx.saved_tensors
        return kernels(places).gather_sum(gradients[0].contiguous(), places), None, None


class _Combine(torch.autograd.Function):
    """The sum of each row's assignments; its derivative gives each assignment its row's."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, row_of: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(row_of)
        return kernels(y).gather_sum(y, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (row_of,) = ctx.saved_tensors
        return gradients[0].index_select(0, row_of), None, None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(both, weight)
        return kernels(both).swiglu(both, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        both, weight = ctx.saved_tensors
        return kernels(both).swiglu_gradient(both, weight, gradients[0].contiguous())


def expert_projection(
    x: Tensor, packed: tuple[Tensor, Tensor], a: Tensor, b: Tensor, ends: Tensor, factor: float
) -> Tensor:
    """Rows [A, in] sorted by expert, up to `ends` [E] int32 of each, to [A, out].

    Args:
        x: the rows.
        packed: words [E, out, in/8] and scales [E, out, in/32] of the frozen weights.
        a: adapters [E, r, in].
        b: adapters [E, out, r].
        ends: of each expert's rows.
        factor: of the adapters.
    """
    return _ExpertProjection.apply(x, *packed, a, b, ends, factor)


def linear(x: Tensor, weight: Tensor, adapter: tuple[Tensor, Tensor], factor: float) -> Tensor:
    """x · Wᵀ + factor · (x · Aᵀ) · Bᵀ of rows."""
    return _Linear.apply(x, weight, *adapter, factor)


def dispatch(x: Tensor, row_of: Tensor, places: Tensor) -> Tensor:
    """Rows [N, D] as assignments [A, D]; places [N, K] are the rows' assignments, -1 where not here."""
    return _Dispatch.apply(x, row_of, places)


def combine(y: Tensor, row_of: Tensor, places: Tensor) -> Tensor:
    """Assignments [A, D] summed into rows [N, D]."""
    return _Combine.apply(y, row_of, places)


def swiglu(both: Tensor, weight: Tensor) -> Tensor:
    """silu(gate) · up · weight of rows [gate | up] and fp32 weights."""
    return _Swiglu.apply(both, weight)
