"""The progress of long work: a bar on a terminal, otherwise a line every ten seconds. Both go to stderr."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

Progress = Callable[[int, int], None]  # called with (images done, images in total); total is 0 while it is unknown
_LINE_EVERY = 10.0  # seconds, where there is no terminal


@contextlib.contextmanager
def show_progress(task: str) -> Iterator[Progress]:
    """Give the block a function to report (done, total) to. `task` is a word such as "packing"."""
    with _open_bar(task) if sys.stderr.isatty() else contextlib.nullcontext(_make_line_printer(task)) as report:
        yield report


def _make_line_printer(task: str) -> Progress:
    started = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINE_EVERY:
            last = now
            rate = done / (now - started)
            of = f" of {total}" if total else ""
            left = f", {(total - done) / rate:.0f} s left" if done and total else ""
            with contextlib.suppress(OSError):  # stderr may be closed
                print(f"{task}: {done}{of} images, {rate:.0f} img/s{left}", file=sys.stderr, flush=True)

    return report


@contextlib.contextmanager
def _open_bar(task: str) -> Iterator[Progress]:
    from rich import progress as rich_progress
    from rich.console import Console

    class Rate(rich_progress.ProgressColumn):
        """Images per second."""

        def render(self, task: rich_progress.Task) -> str:
            return f"{task.speed or 0:.0f} img/s"

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        Rate(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as bars:
        bar = bars.add_task(task, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total or None)
