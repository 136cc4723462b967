"""Measure how long the training step waits for data."""

import time
from collections import deque

import torch


class StallClock:
    """Sum up the seconds for which the step waited for batches.

    On a CPU that is the time for which its thread waits. On a GPU it is the time for which the step's stream had no
    work: from the end of the work that was queued when the batch was asked for, until the batch is there. So the host
    may wait without a stall, as long as the GPU still has queued work. The clock itself never waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._asked: float | torch.cuda.Event = 0.0
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def start_wait(self) -> None:
        """Note that the step asks for a batch."""
        self._asked = self._record_event() if self._device.type == "cuda" else time.monotonic()

    def end_wait(self) -> None:
        """Note that the batch is there. On a GPU the step's stream has been made to wait for it before."""
        if isinstance(self._asked, float):
            self._seconds += time.monotonic() - self._asked
        else:
            self._waits.append((self._asked, self._record_event()))

    def _record_event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def read_seconds(self) -> float:
        """Return the seconds so far. Waits that the device has not finished yet are counted later."""
        while self._waits and self._waits[0][1].query():
            asked, got = self._waits.popleft()
            self._seconds += asked.elapsed_time(got) / 1000
        return self._seconds
