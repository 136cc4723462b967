"""How long the parts of a step take, measured without waiting for the device."""

import time

import torch


class PartClock:
    """Marks the ends of the parts of one step: on a GPU by events in its stream, on a CPU by the time."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []

    def start(self) -> None:
        """Start a new step. Its marks replace those of the step before."""
        self._marks = []
        self.mark("")

    def mark(self, part: str) -> None:
        """Count what was done since the last mark to `part`."""
        if not self._on_gpu:
            self._marks.append((part, time.perf_counter()))
        elif not torch.cuda.is_current_stream_capturing():  # a recorded step has no events that could be read
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))

    def read(self) -> dict[str, float]:
        """Return the milliseconds of each part of the last step by its name; waits for the device.

        The result is empty for a step that was replayed from a CUDA graph.
        """
        found: dict[str, float] = {}
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            found[part] = found.get(part, 0.0) + _milliseconds(before, after)
        return found


def _milliseconds(before: torch.cuda.Event | float, after: torch.cuda.Event | float) -> float:
    if isinstance(before, float) and isinstance(after, float):
        return 1e3 * (after - before)
    assert isinstance(before, torch.cuda.Event)
    assert isinstance(after, torch.cuda.Event)
    after.synchronize()
    return before.elapsed_time(after)
