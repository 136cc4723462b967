"""A network of layers in a row that every version of torch compiles as one graph."""

from torch import Tensor, nn


class Chain(nn.Sequential):
    """An nn.Sequential with a forward of its own.

    torch 2.11 skips the one of nn.Sequential when that is what is compiled: it compiles each layer by itself.
    """

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)
