"""torch.compile for the backbones: one static graph for each resolution."""

import torch

from dino_fast.step.train_step import TrainStep


def compile_backbones(step: TrainStep, backend: str = "inductor") -> None:
    """Compile both backbones when they first see a resolution.

    The graphs are static: a dynamic one for several sizes would lose the channels-last layout. The loss and the head
    are not compiled, since they are few and large operations.
    """
    for network in (step.bare_student, step.teacher):
        network.backbone.compile(dynamic=False, backend=backend)


def find_compile_problem(device: torch.device) -> str | None:
    """Return in one line why nothing can be compiled for this device here, or None where it works. Takes seconds."""
    try:
        torch.compile(_probe, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # whatever is missing: a C++ compiler, Triton, Python's headers
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
    return None


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x.sin() * 2
