"""torch.compile for the backbones: one static graph for each resolution."""

import contextlib
import logging
from collections.abc import Callable, Iterator

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


@contextlib.contextmanager
def report_recompile_limit(say: Callable[[str], None]) -> Iterator[None]:
    """Call `say` once with a line if torch stops compiling inside.

    torch compiles a function for at most eight cases, over all networks of a process together. From there on, new cases
    run uncompiled, and only torch's own log says so.
    """
    watcher = _LimitWatcher(say)
    log = logging.getLogger("torch._dynamo.convert_frame")
    log.addHandler(watcher)
    try:
        yield
    finally:
        log.removeHandler(watcher)


class _LimitWatcher(logging.Handler):
    """Looks for the one message by which torch tells that it compiles no more."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say, self._said = say, False

    def emit(self, record: logging.LogRecord) -> None:
        if self._said or "torch._dynamo hit config." not in str(record.msg):
            return
        self._said = True
        self._say(
            "torch compiles no more in this process (the limit is torch._dynamo.config.recompile_limit). Parts of the "
            "backbones run uncompiled from here on, which costs speed. Start the run in a new process."
        )


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x.sin() * 2
