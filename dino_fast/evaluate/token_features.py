"""The features that the published linear evaluation takes of a vision transformer: tokens of its last blocks."""

from torch import Tensor, nn

from dino_fast.model.vit import VisionTransformer
from shards.errors import UserError

BLOCKS = 4  # last ones whose [CLS] tokens are joined, for ViT-Ti and ViT-S
WIDTH_OF_BASE = 768  # from here on, the last [CLS] token with the mean patch token


class TokenFeatures(nn.Module):
    """Maps images to the joined tokens of a vision transformer (`VisionTransformer.join_tokens`)."""

    def __init__(self, backbone: VisionTransformer, blocks: int, mean_patch: bool) -> None:
        super().__init__()
        self.backbone, self.blocks, self.mean_patch = backbone, blocks, mean_patch

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to features [N, blocks · width], or [N, 2 · width] with the mean patch token."""
        return self.backbone.join_tokens(images, self.blocks, self.mean_patch)

    def __str__(self) -> str:
        if self.mean_patch:
            return "the last [CLS] token with the mean patch token"
        return f"the [CLS] tokens of the last {self.blocks} blocks" if self.blocks > 1 else "the last [CLS] token"


def choose_features(backbone: nn.Module, blocks: int | None = None, mean_patch: bool = False) -> nn.Module:
    """Return a network that maps images to the features for linear classification.

    blocks: number of last blocks whose [CLS] tokens are joined; mean_patch: the last one with the mean patch token.
    With neither, the features are the published ones for the backbone's width. A backbone that is no vision transformer
    is returned as it is. Raises UserError for more blocks than there are, and where there are none.
    """
    if not isinstance(backbone, VisionTransformer):
        if blocks or mean_patch:
            raise UserError(
                "--blocks and --mean-patch are for vision transformers. Leave them out for this checkpoint."
            )
        return backbone
    if blocks is None and not mean_patch:
        mean_patch = backbone.norm.normalized_shape[0] >= WIDTH_OF_BASE
        blocks = 1 if mean_patch else BLOCKS
    count = len(backbone.blocks)
    if blocks is not None and blocks > count:
        raise UserError(f"--blocks {blocks}: this backbone has {count}. Pass at most {count}.")
    return TokenFeatures(backbone, blocks or 1, mean_patch)
