"""How long the step waits for data."""

import time
from collections import deque

import torch


class StallClock:
    """Seconds that the step stood waiting for batches.

    On the CPU that is the time that its thread waits. On a GPU it is the time for which the step's stream had nothing
    to do: from the end of what was queued on it when the batch was asked for, to the moment when the batch was there.
    So a wait of the host that queued work hides is none. Nothing here waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._asked: float | torch.cuda.Event = 0.0
        self._open: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def ask(self) -> None:
        """The step asks for a batch."""
        self._asked = self._event() if self._device.type == "cuda" else time.monotonic()

    def get(self) -> None:
        """The batch is there; on a GPU: the step's stream has been told to wait for it."""
        if isinstance(self._asked, float):
            self._seconds += time.monotonic() - self._asked
        else:
            self._open.append((self._asked, self._event()))

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def read(self) -> float:
        """The seconds so far, as far as the device has got."""
        while self._open and self._open[0][1].query():
            asked, got = self._open.popleft()
            self._seconds += asked.elapsed_time(got) / 1000
        return self._seconds
