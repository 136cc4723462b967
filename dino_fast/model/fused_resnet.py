"""torchvision's ResNets in train mode with batch norm, addition, ReLU and pooling in a few passes over memory."""

from itertools import chain

import torch
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

from dino_fast.model.kernels.batch_norm import norm_add_relu, norm_relu, norm_relu_pool


class FusedResNet(ResNet):
    """A `models.ResNet` with the same modules, parameters and results. In eval mode it is exactly that."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, 3, H, W], channels-last, to [N, D]."""
        if not self.training:
            return super().forward(x)
        # Two operations use a block's output: the next block's first convolution, and the way around that block.
        inner, around = norm_relu_pool(self.conv1(x), self.bn1)
        for block in chain(self.layer1, self.layer2, self.layer3, self.layer4):
            inner, around = run_block(block, inner, around)
        features: Tensor = self.fc(torch.flatten(self.avgpool(inner), 1))
        return features


def run_block(block: BasicBlock | Bottleneck, inner: Tensor, around: Tensor) -> tuple[Tensor, Tensor]:
    """Run a block on two copies of one tensor. Returns two copies of its output."""
    layers = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
    if not isinstance(block, BasicBlock):
        layers.append((block.conv3, block.bn3))
    *before, (last_conv, last_norm) = layers
    for conv, norm in before:
        inner = norm_relu(conv(inner), norm)
    inner = last_conv(inner)
    if block.downsample is None:
        return norm_add_relu(inner, last_norm, around)
    conv, norm = block.downsample
    return norm_add_relu(inner, last_norm, conv(around), norm)


def fuse_norms(network: nn.Module) -> bool:
    """Make every torchvision ResNet in `network` a FusedResNet, in place. Returns whether there was one."""
    found = [module for module in network.modules() if type(module) is ResNet]
    for module in found:
        module.__class__ = FusedResNet
    return bool(found)
