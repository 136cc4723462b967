"""Vision transformers (Dosovitskiy et al. 2021) with the parameter names and the numerics of facebookresearch/dino.

They are written here because nobody else's gives these figures: timm interpolates the position embedding to a size,
where the published code samples it at a scale (`interpolate_positions`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dino_fast.model.drop_path import BRANCHES

EPS = 1e-6  # of layer norms
BUILT_FOR = 224  # pixels a side of the images whose patches have a position embedding each
DEPTH = 12  # blocks, in all published sizes


class PatchEmbed(nn.Module):
    """Maps each patch of an image to a token. What is left over at the right and at the bottom is dropped."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)  # keeps torch's first weights, as published

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, 3, H, W] to [N, width, rows, columns]."""
        tokens: Tensor = self.proj(x)
        return tokens


class Attention(nn.Module):
    """Self-attention of several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)  # rows: all queries, all keys, all values, heads one after another
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [N, T, width] to [N, T, width]."""
        out: Tensor = self.proj(attend(*self.split_heads(x)).transpose(1, 2).flatten(2))
        return out

    def split_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of tokens [N, T, width], each [N, heads, T, width / heads]."""
        queries, keys, values = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return queries, keys, values

    def weigh(self, x: Tensor) -> Tensor:
        """Return the attention weights of tokens [N, T, width]: [N, heads, T, T], of which each row has the sum 1."""
        queries, keys, _ = self.split_heads(x)
        return weigh(queries, keys)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return softmax(q · kᵀ / √d) · v. All are [N, heads, T, d].

    On a CPU a gradient goes through the weights themselves: that of torch's fused attention takes up to ten times as
    long there.
    """
    if queries.device.type == "cpu" and torch.is_grad_enabled():
        return weigh(queries, keys) @ values
    return F.scaled_dot_product_attention(queries, keys, values)


def weigh(queries: Tensor, keys: Tensor) -> Tensor:
    """Return softmax(q · kᵀ / √d), [N, heads, T, T], of queries and keys [N, heads, T, d]."""
    return (queries * queries.shape[-1] ** -0.5 @ keys.transpose(-2, -1)).softmax(-1)


class Mlp(nn.Module):
    """Two linear layers with a GELU (exact, not the tanh approximation) between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Attention, then an MLP. Each adds to its input, and has a layer norm before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, scales: Tensor | None = None) -> Tensor:
        """Map tokens [N, T, width] to [N, T, width]. `scales` [2, N] are what both branches are multiplied by."""
        attended = self.attn(self.norm1(x))
        x = x + (attended if scales is None else attended * scales[0].view(-1, 1, 1).to(attended.dtype))
        mapped = self.mlp(self.norm2(x))
        return x + (mapped if scales is None else mapped * scales[1].view(-1, 1, 1).to(mapped.dtype))


class VisionTransformer(nn.Module):
    """Maps images [N, 3, H, W] of any size to features [N, width]: the [CLS] token after the last norm."""

    def __init__(self, patch: int, width: int, heads: int, built_for: int = BUILT_FOR) -> None:
        super().__init__()
        self.patch = patch
        self.activation_checkpointing = False
        """whether the backward pass computes each block again, from its input alone, which is all that is kept"""
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (built_for // patch) ** 2, width))  # [CLS] first
        self.patch_embed = PatchEmbed(patch, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(width, eps=EPS)
        for parameter in (self.pos_embed, self.cls_token):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, scales: Tensor | None = None) -> Tensor:
        """Map images [N, 3, H, W] to features [N, width]. `scales` [2·DEPTH, N]: those of `draw_branch_scales`."""
        x = self.embed(x)
        for number, block in enumerate(self.blocks):
            given = (x, None if scales is None else scales[BRANCHES * number : BRANCHES * (number + 1)])
            x = self._run_again_later(block, *given) if self.activation_checkpointing else block(*given)
        cls: Tensor = self.norm(x)[:, 0]
        return cls

    @staticmethod
    def _run_again_later(block: nn.Module, x: Tensor, scales: Tensor | None) -> Tensor:
        """Run a block, and once more in the backward pass (Chen et al. 2016). Blocks draw no random numbers."""
        out: Tensor = checkpoint(block, x, scales, use_reentrant=False, preserve_rng_state=False)
        return out

    def embed(self, x: Tensor) -> Tensor:
        """Return the tokens of images [N, 3, H, W] before the first block: [N, 1 + patches, width], [CLS] first."""
        height, width = x.shape[-2:]
        patches = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        return tokens + self.interpolate_positions(height, width)

    def interpolate_positions(self, height: int, width: int) -> Tensor:
        """Return the position embedding for images of this size in pixels, [1, 1 + patches, width].

        The embedding is sampled at the published scale, (patches + 0.1) / √N. The 0.1 changes every sample but a
        little, and is kept in the scale (it is not rounded away as with a size). Only a square image of as many
        patches as the embedding has takes it as it is.
        """
        rows, columns = height // self.patch, width // self.patch
        count = self.pos_embed.shape[1] - 1
        if rows * columns == count and height == width:
            return self.pos_embed
        side = round(count**0.5)
        grid = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / side, (columns + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def last_tokens(self, x: Tensor, count: int) -> list[Tensor]:
        """Return the tokens after each of the last `count` blocks and the last norm: [N, 1 + patches, width] each.

        The earliest block comes first, as `get_intermediate_layers` of the published code has it.
        """
        x, found = self.embed(x), []
        for number, block in enumerate(self.blocks, 1):
            x = block(x)
            if number > len(self.blocks) - count:
                found.append(self.norm(x))
        return found

    def last_attention(self, x: Tensor) -> Tensor:
        """Return the attention weights of the last block: [N, heads, 1 + patches, 1 + patches], [CLS] first."""
        x = self.embed(x)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        assert isinstance(last, Block)
        return last.attn.weigh(last.norm1(x))

    def join_tokens(self, x: Tensor, count: int, mean_patch: bool) -> Tensor:
        """Return the features that the published linear evaluation takes: [N, count · width].

        They are the [CLS] tokens of the last `count` blocks, the earliest first. With `mean_patch` each value is
        followed by that of the last block's mean patch token, so that the width doubles; it takes a count of 1.
        """
        tokens = self.last_tokens(x, count)
        joined = torch.cat([of_block[:, 0] for of_block in tokens], dim=1)
        if not mean_patch:
            return joined
        return torch.stack([joined, tokens[-1][:, 1:].mean(1)], dim=2).flatten(1)
