"""Batch normalisation whose statistics are those of all samples and places, wherever they lie.

Source: S. Ioffe, C. Szegedy, "Batch normalization", ICML 2015, algorithm 1 and the gradients of section 3.  One
exchange each way: forward the sums of x - s and (x - s)² and their number (2 C + 1 values), backward those of ∇y and
∇y x̂ (2 C).  s is the running mean, the same on all workers: near the mean, so that the difference of sums loses little.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from windlass.parallel.connect import nothing
from windlass.parallel.transport import Transport, reduce


class PlacedBatchNorm(nn.Module):
    """Batch normalisation over several workers; parameters and buffers as those of PyTorch's module.

    Args:
        norm: the module that it computes, with this worker's part of the channels.
        axes: of the mesh, along which samples or places are divided.
        transport: the way to the others.
        name: for whom the bytes are counted.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, norm: Any, *, axes: tuple[int, ...], transport: Transport, name: str) -> None:
        super().__init__()
        self.eps, self.momentum, self.num_features = norm.eps, norm.momentum, norm.num_features
        for key in ("weight", "bias"):
            self.register_parameter(key, norm._parameters[key])
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(key, norm._buffers[key])
        self.axes, self.transport, self.name = axes, transport, name

    def forward(self, x: Tensor) -> Tensor:
        """Normalise by the batch in training, by the running statistics in evaluation."""
        if not self.training and self.running_mean is not None:
            return self._by_running(x)
        shift = self.running_mean.clone() if self.running_mean is not None else x.new_zeros(x.shape[1])
        found: list[Tensor] = []
        y: Tensor = _Normalise.apply(x, self.weight, self.bias, shift, self, found)  # type: ignore[no-untyped-call]
        if self.training and self.running_mean is not None:
            self._track(*found)
        return y

    def _by_running(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return nothing(x.shape, [t for t in (x, self.weight, self.bias) if t is not None])
        return functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        share: Any = self.momentum
        if share is None:  # the mean over all batches
            assert self.num_batches_tracked is not None
            share = 1.0 / self.num_batches_tracked.to(mean.dtype)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(var * (count / (count - 1)), share)

    def extra_repr(self) -> str:
        """As PyTorch's."""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor, norm: Any, found: list[Tensor]
    ) -> Tensor:
        sums = _summed(_sums(x, shift), norm, "forward")
        channels = x.shape[1]
        count = sums[-1]
        off, square = sums[:channels] / count, sums[channels:-1] / count
        mean, var = shift + off, (square - off * off).clamp_min_(0)
        found += [mean, var, count]
        ctx.norm = norm
        ctx.save_for_backward(x, weight, mean, var, count)
        if x.numel() == 0:
            return torch.zeros_like(x)
        return functional.batch_norm(x, mean, var, weight, bias, False, 0.0, norm.eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        along, plain = _grad_sums(grad, x, mean, var, ctx.norm.eps)
        wanted = ctx.needs_input_grad
        grad_x = None
        if wanted[0]:
            both = _summed(torch.cat((along, plain)), ctx.norm, "backward") / count
            grad_x = _grad_input(grad, x, weight, mean, (var + ctx.norm.eps).rsqrt(), both)
        return grad_x, along if wanted[1] else None, plain if wanted[2] else None, None, None, None


def _sums(x: Tensor, shift: Tensor) -> Tensor:
    """Per channel the sums of x - shift and of its squares, then how many there are."""
    dims = [dim for dim in range(x.dim()) if dim != 1]
    if x.numel() == 0:
        return x.new_zeros(2 * x.shape[1] + 1)
    count = x.numel() // x.shape[1]
    var, mean = torch.var_mean(x, dims, correction=0)
    off = mean - shift
    return torch.cat((off * count, (var + off * off) * count, off.new_full((1,), count)))


def _grad_sums(grad: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Per channel the sums of ∇y x̂ and of ∇y."""
    if x.numel() == 0:
        return torch.zeros_like(mean), torch.zeros_like(mean)
    mask = [False, True, True]
    backward: Any = torch.ops.aten.native_batch_norm_backward
    _, along, plain = backward(grad, x, torch.ones_like(mean), mean, var, None, None, False, eps, mask)
    return along, plain


def _grad_input(grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor, means: Tensor) -> Tensor:
    """∇x = s (∇y - mean ∇y - x̂ mean(∇y x̂)), s = γ/σ, in two passes over the maps."""
    along, plain = means.chunk(2)
    factor = scale if weight is None else scale * weight
    slope = -factor * scale * along
    shape = (1, -1, *[1] * (x.dim() - 2))
    constant = -factor * plain - slope * mean
    return torch.addcmul(constant.view(shape), x, slope.view(shape)).addcmul_(grad, factor.view(shape))


def _summed(values: Tensor, norm: PlacedBatchNorm, phase: str) -> Tensor:
    for axis in norm.axes:
        values = reduce(norm.transport, values, axis, tag=(norm.name, phase))
    return values
