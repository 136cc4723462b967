"""How long the parts of a step take, without a wait for the device until someone asks."""

import time

import torch


class PartClock:
    """Marks in the work of one step: on a GPU events in its stream, a microsecond each, on a CPU the time."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []

    def start(self) -> None:
        """A new step begins here. Its marks take the place of the last one's."""
        self._marks = []
        self.mark("")

    def mark(self, part: str) -> None:
        """What was done since the last mark belongs to `part`."""
        if not self._on_gpu:
            self._marks.append((part, time.perf_counter()))
        elif not torch.cuda.is_current_stream_capturing():  # in a graph there is no time to be had
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))

    def read(self) -> dict[str, float]:
        """Milliseconds of each part of the last step, by name; waits for the device. Empty from a replayed graph."""
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
