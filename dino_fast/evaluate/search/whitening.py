"""Whitening of descriptors, learnt on images of another set, as the published copy detection does it.

The mean is subtracted, but the directions and their scales are those of the second moments about zero, not about the
mean. So this is not quite a whitening in the sense of statistics. The published figures need it as it is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST_EIGENVALUE = 1e-5  # as a share of the largest one
_CHUNK = 8192  # descriptors that are multiplied in float64 at once


@dataclass(frozen=True)
class Whitening:
    """Maps descriptors x to matrix · (x − mean)."""

    mean: Tensor
    """[D], float64, on the CPU"""
    matrix: Tensor
    """[d, D], float64, on the CPU; a row for each direction, the largest eigenvalue first"""

    def apply(self, descriptors: Tensor) -> Tensor:
        """Map descriptors [N, D] to [N, d], of the same type and device."""
        parts = [
            ((part.cpu().double() - self.mean) @ self.matrix.T).to(descriptors) for part in descriptors.split(_CHUNK)
        ]
        return torch.cat(parts)


def learn_whitening(descriptors: Tensor, dims: int | None = None) -> Whitening:
    """Learn from descriptors [N, D], which are not normalized. `dims`: how many directions are kept, or None for all.

    Eigenvalues below 1e-5 of the largest are raised to that. They occur where N is less than D.
    """
    width = descriptors.shape[1]
    total, moments = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for part in descriptors.split(_CHUNK):
        x = part.cpu().double()
        total += x.sum(0)
        moments += x.T @ x
    values, vectors = torch.linalg.eigh(moments / len(descriptors))
    values = values.clamp(min=float(values[-1]) * _LEAST_EIGENVALUE).flip(0)[:dims]
    vectors = vectors.flip(1)[:, :dims]
    return Whitening(total / len(descriptors), vectors.T / values.sqrt()[:, None])
