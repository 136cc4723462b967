"""The parts of a run, put together, and the words for where it starts and ends."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from dino_fast.config import Recipe
from dino_fast.distributed import Ranks
from dino_fast.evaluate.online_knn import OnlineKnn
from dino_fast.run.checkpoint_writer import CheckpointWriter
from dino_fast.run.monitor import Monitor
from dino_fast.run.recipe_changes import to_plain_data
from dino_fast.run.schedules import Schedules
from dino_fast.run.signals import StopSignal
from dino_fast.step.train_step import TrainStep
from pipelines.loader import Loader


class Start(NamedTuple):
    """Where training starts, at first or after the run went back to a checkpoint."""

    step: int
    """number of steps that are done"""
    rollbacks: int
    """how often the run has gone back to a checkpoint so far, each time for half the learning rate"""
    notes: list[str]
    """lines to print"""


class End(NamedTuple):
    """How training from some step on ended."""

    done: int
    """number of steps of the run that are done"""
    trouble: str
    """why the run must go back to a checkpoint; empty if it need not"""
    stopped_by_signal: bool
    """whether a signal asked the run to stop"""


@dataclass(frozen=True)
class TrainingRun:
    """The parts of a run, put together."""

    recipe: Recipe
    """all settings"""
    ranks: Ranks
    """this process among the others"""
    loader: Loader
    """the batches"""
    schedules: Schedules
    """the hyper-parameters of every step"""
    step: TrainStep
    """networks, optimizer, and the step that changes them"""
    recorded: bool
    """whether steps are recorded as a CUDA graph"""
    stop: int
    """number of steps after which the run is over"""
    knn: OnlineKnn | None
    """the k-NN score of the run; None if the recipe asks for none"""
    signal: StopSignal
    """the signals that stop the run"""
    monitor: Monitor
    """the log"""
    writer: CheckpointWriter | None
    """the writer of checkpoints; only the first rank has one"""
    fingerprint: str
    """hash of the data"""

    def save(self, done: int, rollbacks: int) -> None:
        """Have the checkpoint after `done` steps written. The clock stands still while the state is copied."""
        if self.writer is not None:
            with self.monitor.paused():
                self.writer.save(done, self.state(rollbacks))

    def state(self, rollbacks: int) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        settings = to_plain_data(self.recipe)
        return {"recipe": settings, "data": self.fingerprint, "rollbacks": rollbacks, "model": self.step.state_dict()}
