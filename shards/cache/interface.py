"""What every cache of shards can do."""

import enum
from typing import Protocol


class Outcome(enum.Enum):
    """The result of one attempt to acquire a shard."""

    HELD = "held"  # the shard is ready to be read
    BUSY = "busy"  # another process or thread is fetching or verifying it
    FULL = "full"  # there is no room until a shard is released


class Cache(Protocol):
    """A place where shards are made ready before they are read. Safe in threads. Shards are named by their numbers."""

    def acquire(self, number: int) -> Outcome:
        """Try to make a shard ready and keep it until it is released. Does not wait for other processes."""

    def release(self, number: int) -> None:
        """Let go of a shard, if it was acquired."""

    def require_room(self, count: int) -> None:
        """Raise UserError unless any `count` shards can be ready at once."""

    def explain_delay(self, number: int, outcome: Outcome, seconds: float) -> str:
        """Return why a shard is not ready after `seconds` and what to do, in one line."""


def explain_slow_storage(name: str, seconds: float) -> str:
    """Return the message for a shard that the storage did not deliver in time."""
    return f"{name}: not read within {seconds:.0f} s. Check the storage, then run the same command again."
