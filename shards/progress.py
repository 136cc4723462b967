"""How far long work has come: a bar on a terminal, else a line now and then; both on stderr."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

Progress = Callable[[int, int], None]  # pictures done, pictures in all; 0 in all: not known yet
_LINE_EVERY = 10.0  # seconds, where there is no terminal


@contextlib.contextmanager
def progress(doing: str) -> Iterator[Progress]:
    """What to tell (done, total) to while `doing`."""
    with _bar(doing) if sys.stderr.isatty() else contextlib.nullcontext(_lines(doing)) as tell:
        yield tell


def _lines(doing: str) -> Progress:
    began = last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINE_EVERY:
            last = now
            rate = done / (now - began)
            of = f" of {total}" if total else ""
            left = f", {(total - done) / rate:.0f} s left" if done and total else ""
            with contextlib.suppress(OSError):  # nobody reads on
                print(f"{doing}: {done}{of} pictures, {rate:.0f} img/s{left}", file=sys.stderr, flush=True)

    return tell


@contextlib.contextmanager
def _bar(doing: str) -> Iterator[Progress]:
    from rich import progress as rich_progress
    from rich.console import Console

    class Rate(rich_progress.ProgressColumn):
        """Pictures a second."""

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
        bar = bars.add_task(doing, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total or None)
