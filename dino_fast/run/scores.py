"""The k-NN score of a run under way."""

import time

from dino_fast.config import Recipe
from dino_fast.distributed import Ranks
from dino_fast.evaluate.online_knn import OnlineKnn
from dino_fast.model.trial import check_size
from dino_fast.run.training_run import TrainingRun
from shards.errors import UserError


def open_knn(recipe: Recipe, ranks: Ranks) -> OnlineKnn | None:
    """Open the labeled shards of the k-NN score. Returns None if the recipe asks for no score."""
    if not recipe.knn.enabled:
        return None
    check_size(recipe.backbone, recipe.knn.crop or recipe.crops.global_size, "--knn.crop")
    return OnlineKnn(recipe.knn, recipe.crops.global_size, ranks, recipe.data.normalization)


def log_knn_if_due(run: TrainingRun, done: int) -> None:
    """Log the teacher's k-NN score and the seconds that it took, if it is due. The clock stands still meanwhile.

    An image that cannot be read costs the score, not the run.
    """
    if run.knn is None or not (run.schedules.score_is_due(done) or done == run.stop):
        return
    begin = time.monotonic()
    try:
        with run.monitor.paused():
            top1 = run.knn.score(run.step.teacher.backbone)
        seconds = time.monotonic() - begin
        run.monitor.record(done - 1, {"knn_top1": top1, "knn_s": seconds})
        run.monitor.say(
            f"after step {done}: k-NN top-1 {top1:.2f} % of {run.knn.val_images:,} images, in {seconds:.1f} s"
        )
    except UserError as error:
        run.monitor.say(f"no k-NN score after step {done}: {error}")
