"""Batch norm over the batches of all ranks, on any device that torch.distributed can send from.

`torch.nn.SyncBatchNorm` refuses CPU tensors. This one sends one message a layer in each direction. Forward it holds the
count, mean and sum of squared deviations of each rank, combined by the formula of Chan et al. 1979; backward two sums.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm


def world_size() -> int:
    """Return the number of ranks, 1 when torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class SyncBatchNorm(_BatchNorm):
    """An nn.BatchNorm1d or 2d whose training statistics are those of all ranks' batches together.

    Parameters, buffers and their names are nn.BatchNorm's. Batches [N, C, …] may differ in N between ranks. None may be
    empty. In eval mode, and with one rank, it is nn.BatchNorm itself.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        mean, var, count = global_statistics(x.detach())
        if self.track_running_stats:
            self._track(mean, var, count)
        weight = torch.ones_like(mean) if self.weight is None else self.weight
        bias = torch.zeros_like(mean) if self.bias is None else self.bias
        return _Normalize.apply(x, weight, bias, mean, torch.rsqrt(var + self.eps), count)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        unbiased = var * (count / (count - 1).clamp(min=1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.mul_(1 - share).add_(new.to(running.dtype) * share)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm needs [N, C, ...], got {tuple(input.shape)}")


class SyncBatchNormAct(SyncBatchNorm):
    """Does that for timm's BatchNormAct2d, in which a drop layer and an activation follow the norm."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.drop(super().forward(x)))
        return out


def convert_sync_batchnorm(module: nn.Module) -> None:
    """Replace every nn.BatchNorm1d and nn.BatchNorm2d below `module` in place, keeping parameters and buffers.

    What timm's norms hold beside them stays, too. Raises TypeError for a norm of another class, which may do more.
    """
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
            setattr(module, name, _make_synchronized(child))
        else:
            convert_sync_batchnorm(child)


def _make_synchronized(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> SyncBatchNorm:
    inside = dict(norm.named_children())
    if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d) and inside.keys() != {"drop", "act"}:
        raise TypeError(f"{type(norm).__name__} is a batch norm that cannot be synchronized over ranks")
    kind = SyncBatchNormAct if inside else SyncBatchNorm
    new = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    for name, child in inside.items():
        new.add_module(name, child)
    new.weight, new.bias = norm.weight, norm.bias
    new.running_mean, new.running_var = norm.running_mean, norm.running_var
    new.num_batches_tracked = norm.num_batches_tracked
    return new.train(norm.training)


def global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean [C], biased variance [C] and count (a scalar) of all ranks' x, [N, C, …], in one all-gather.

    They are in float32, or float64 for float64. The count is a tensor, so that the host need not wait for it.
    """
    var, mean = torch.var_mean(_wide(x), dim=_sample_dims(x), correction=0)
    count = mean.new_full((1,), x.numel() / x.shape[1])
    message = torch.cat([count, mean, var * count])
    gathered = message.new_empty(world_size() * message.numel())
    dist.all_gather_into_tensor(gathered, message)
    counts, means, deviations = gathered.view(world_size(), -1).split([1, x.shape[1], x.shape[1]], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    return mean, (deviations + counts * (means - mean).square()).sum(0) / total, total


class _Normalize(torch.autograd.Function):
    """Computes weight · (x − mean) / std + bias, differentiated through the statistics of all ranks' x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, count: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, inverse_std, count)
        scale = _wide(weight) * inverse_std
        return _cast((x - _per_channel(mean, x)) * _per_channel(scale, x) + _per_channel(bias, x), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        normalized = (x - _per_channel(mean, x)) * _per_channel(inverse_std, x)
        grad = _wide(grad)
        local = torch.stack([grad.sum(_sample_dims(x)), (grad * normalized).sum(_sample_dims(x))])
        means = local.clone()
        dist.all_reduce(means)
        mean_grad, mean_product = (means / count).unbind()
        # x's own layout comes out (channels-last or not), since it leads the expression.
        grad_x = normalized.mul(_per_channel(-mean_product, x)).add(grad).sub(_per_channel(mean_grad, x))
        grad_x = grad_x.mul(_per_channel(_wide(weight) * inverse_std, x))
        grad_bias, grad_weight = local.unbind()
        casts = _cast(grad_x, x.dtype), _cast(grad_weight, weight.dtype), _cast(grad_bias, weight.dtype)
        return *casts, None, None, None


def _sample_dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


def _wide(x: Tensor) -> Tensor:
    return _cast(x, torch.promote_types(x.dtype, torch.float32))


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in a type.

    Where x has it already, nothing is called: in a compiled `autograd.Function`, the Dynamo of torch 2.11 takes a cast
    that changes nothing for a constant, and differentiates it to 0.
    """
    return x if x.dtype == dtype else x.to(dtype)
