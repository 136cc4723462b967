"""Hold one rank's share of a step, ready for training."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass
class Batch:
    """One rank's share of a step. Views are stacked one after another: view 0 of all images, then view 1 of all."""

    step: int
    """number of the training step"""
    ids: npt.NDArray[np.int64]
    """sample ids [B]"""
    globals: Tensor
    """global views [2·B, 3, G, G], normalized, channels-last"""
    locals: Tensor | None
    """local views [n·B, 3, L, L], normalized, channels-last; None where the recipe has no local views"""
    ready: torch.cuda.Event | None = None
    """event after the batch on the stream that made it; None on a CPU"""

    def hand_over(self, device: torch.device) -> None:
        """Make the device's current stream wait for the batch, and keep the batch's memory until that stream is done.

        The host does not wait. On a CPU there is nothing to do.
        """
        if self.ready is not None:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(self.ready)
            for views in (self.globals, self.locals):
                if views is not None:
                    views.record_stream(stream)
