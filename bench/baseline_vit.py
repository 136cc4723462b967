"""Vision transformers for the baselines of the step, without this project's code.

`PUBLISHED` computes as the published code does (facebookresearch/dino, `vision_transformer.py`), one operation after
another. `STOCK` takes what PyTorch has for it. Parameters have the published names, as ours have, so that a state of
one loads into the other. What they repeat of ours is meant: they must stay as they are, however ours may change.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from dino_fast.model.vit import Block, VisionTransformer

EPS = 1e-6  # of layer norms


class VitStyle(NamedTuple):
    """How a baseline computes what can be computed in several ways."""

    attend: Callable[[Tensor], Tensor]
    """maps queries, keys and values, together [3, N, heads, T, d], to [N, heads, T, d]"""
    drop: Callable[[Tensor, float], Tensor]
    """sets a branch [N, T, width] to 0 for each sample with this probability, and divides the others by the rest"""


def attend_eagerly(split: Tensor) -> Tensor:
    """Return softmax(q · kᵀ / √d) · v. The weights [N, heads, T, T] lie in memory."""
    queries, keys, values = split[0], split[1], split[2]
    weights = (queries @ keys.transpose(-2, -1)) * queries.shape[-1] ** -0.5
    return weights.softmax(dim=-1) @ values


def attend_at_once(split: Tensor) -> Tensor:
    """Return the same by torch's fused attention. `unbind` has one gradient, where three indices have three."""
    queries, keys, values = split.unbind(0)
    return F.scaled_dot_product_attention(queries, keys, values)


def drop_eagerly(branch: Tensor, rate: float) -> Tensor:
    """Drop by one uniform number a sample, which is drawn on the branch's device in its type."""
    kept = 1 - rate
    draws = torch.rand((len(branch), 1, 1), dtype=branch.dtype, device=branch.device)
    return branch.div(kept) * (kept + draws).floor_()


PUBLISHED = VitStyle(attend_eagerly, drop_eagerly)
STOCK = VitStyle(attend_at_once, partial(stochastic_depth, mode="row"))


class BaselineVit(nn.Module):
    """Maps images [N, 3, H, W] to the [CLS] features [N, width]."""

    def __init__(self, like: VisionTransformer, style: VitStyle, drop_path: float) -> None:
        """Make a network of the same sizes as `like`. `drop_path` is the rate of the last block."""
        super().__init__()
        width = like.pos_embed.shape[-1]
        self.patch = like.patch
        self.cls_token = nn.Parameter(torch.zeros_like(like.cls_token))
        self.pos_embed = nn.Parameter(torch.zeros_like(like.pos_embed))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, kernel_size=self.patch, stride=self.patch)})
        rates = torch.linspace(0, drop_path, len(like.blocks)).tolist()
        self.blocks = nn.Sequential(
            *(_Block(width, count_heads(block), style, rate) for block, rate in zip(like.blocks, rates, strict=True))
        )
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1)
        tokens = tokens + self.interpolate_positions(*x.shape[-2:])
        cls: Tensor = self.norm(self.blocks(tokens))[:, 0]
        return cls

    def interpolate_positions(self, height: int, width: int) -> Tensor:
        """Return the position embedding for images of this size in pixels, at the scale (patches + 0.1) / side."""
        rows, columns = height // self.patch, width // self.patch
        count = self.pos_embed.shape[1] - 1
        if rows * columns == count and height == width:
            return self.pos_embed
        side = int(count**0.5)
        grid = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=((rows + 0.1) / side, (columns + 0.1) / side), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def count_heads(block: nn.Module) -> int:
    """Return the heads of one of our blocks."""
    assert isinstance(block, Block)
    return block.attn.heads


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, style: VitStyle) -> None:
        super().__init__()
        self.heads, self.attend = heads, style.attend
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, width = x.shape
        split = self.qkv(x).reshape(count, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(self.attend(split).transpose(1, 2).reshape(count, tokens, width))
        return out


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, style: VitStyle, rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = _Attention(width, heads, style)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = _Mlp(width)
        self.rate, self.style = rate, style

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))

    def drop(self, branch: Tensor) -> Tensor:
        """Apply drop path, which the first block and the teacher have not."""
        return self.style.drop(branch, self.rate) if self.rate else branch
