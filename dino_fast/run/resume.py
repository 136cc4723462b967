"""Where a run starts: at its newest checkpoint, at its beginning, or back at a checkpoint after trouble.

The two functions at the end find the trouble that makes a run go back.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dino_fast import checkpoint
from dino_fast.config import Recipe
from dino_fast.distributed import Ranks
from dino_fast.run.initial_weights import load_initial_weights
from dino_fast.run.recipe_changes import add_defaults, find_differences, to_plain_data
from dino_fast.run.training_run import Start, TrainingRun
from dino_fast.step.train_step import TrainStep
from shards.errors import UserError


def resume_run(recipe: Recipe, ranks: Ranks, step: TrainStep, fingerprint: str) -> Start | None:
    """Load the newest valid checkpoint into `step` on every rank. Returns None if there is none.

    Raises UserError if the checkpoint is of another recipe or other data and `accept_changes` is off, if it does not
    fit the networks, or if all checkpoints are damaged.
    """
    found = _load_on_all_ranks(recipe, ranks)
    if found is None:
        return None
    state, notes = found
    changes = _find_changes(recipe, state, fingerprint)
    what = f"--output {recipe.output} holds a run of another recipe or other data ({'; '.join(changes)})"
    if changes and not recipe.accept_changes:
        raise UserError(f"{what}. Undo that, choose another --output, or pass --accept_changes true.")
    try:
        step.load_state_dict(state["model"])
    except (RuntimeError, KeyError, ValueError) as error:
        what = what if changes else f"--output {recipe.output} holds a checkpoint"
        raise UserError(f"{what}, whose state does not fit this one. Choose another --output.") from error
    rollbacks = _count_rollbacks(state, changes)
    rate = (
        f", at {0.5**rollbacks:g} of the recipe's learning rate after {rollbacks} rollback{'s' * (rollbacks > 1)}"
        if rollbacks
        else ""
    )
    notes += [f"resumed from step {state['step']} of {recipe.output}{rate}", *changes]
    return Start(state["step"], rollbacks, notes + _tell_of_unread_weights(recipe, state))


def _tell_of_unread_weights(recipe: Recipe, state: dict[str, Any]) -> list[str]:
    """Return a line where --init_from names other weights than those that the run began with."""
    if recipe.init_from in ("", state["recipe"].get("init_from", "")):
        return []
    return [
        f"--init_from {recipe.init_from} was not read: it is for new runs, and this one goes on from its checkpoint. "
        "Choose another --output to start from these weights"
    ]


def _load_on_all_ranks(recipe: Recipe, ranks: Ranks) -> tuple[dict[str, Any], list[str]] | None:
    """Return the newest valid checkpoint's state, which the first rank reads, and lines to print."""
    found: list[Any] = [_load_newest(Path(recipe.output)) if ranks.first else None]
    if ranks.world > 1:
        dist.broadcast_object_list(found, device=ranks.device)
    loaded: tuple[dict[str, Any], list[str]] | None = found[0]
    return loaded


def _load_newest(output: Path) -> tuple[dict[str, Any], list[str]] | None:
    """Load the newest valid checkpoint, and rename the damaged ones, so that they do not count among those kept."""
    found = checkpoint.load_newest(output)
    if found is None:
        return None
    state, damaged = found
    for path in damaged:
        path.rename(path.with_name(f"damaged-{path.name}"))
    return state, [
        f"{path} is damaged and was renamed to damaged-{path.name}. An older checkpoint is used" for path in damaged
    ]


def _find_changes(recipe: Recipe, state: dict[str, Any], fingerprint: str) -> list[str]:
    """Return a line for each setting in which the recipe differs from the checkpoint's, and one for other data."""
    changes = list(find_differences(add_defaults(state["recipe"], to_plain_data(Recipe())), to_plain_data(recipe)))
    if state["data"] != fingerprint:
        changes.append(f"data.train: {recipe.data.train} holds other data than the run began with")
    return changes


def _count_rollbacks(state: dict[str, Any], changes: list[str]) -> int:
    """Return the rollbacks so far. The count starts again if an optimizer setting or the precision changed."""
    fixed = any(change.startswith(("optim.", "precision:")) for change in changes)
    return 0 if fixed else int(state.get("rollbacks", 0))


def start_run(recipe: Recipe, ranks: Ranks, step: TrainStep) -> Start:
    """Start a new run, from other weights where the recipe names some. The first rank reads them for all."""
    if not recipe.init_from:
        return Start(0, 0, [])
    notes = load_initial_weights(step, Path(recipe.init_from)) if ranks.first else []
    if ranks.world > 1:
        networks = step.bare_student.state_dict(), step.teacher.state_dict()
        for tensor in (*networks[0].values(), *networks[1].values(), step.center):
            dist.broadcast(tensor, 0)
        step.update.after_load()
    return Start(0, 0, notes)


def roll_back(run: TrainingRun, before: Start, trouble: str) -> Start:
    """Go back to the newest valid checkpoint, and on from there with half the learning rate.

    The same batches at the same rate would end the same way. Raises UserError where this was done too often, or where
    there is no checkpoint.
    """
    recipe = run.recipe
    fix = "Lower --optim.lr, or use --precision bf16 or fp32, and pass --accept_changes true."
    if before.rollbacks >= recipe.health.rollbacks:
        raise UserError(f"{trouble}. {fix} The newest checkpoint was saved before the trouble and is still good.")
    if run.writer is not None:
        run.writer.wait_until_idle()
    start = resume_run(recipe, run.ranks, run.step, run.fingerprint)
    if start is None:
        raise UserError(f"{trouble}. {fix} There was no checkpoint yet to go back to.")
    rollbacks = before.rollbacks + 1
    run.monitor.restart(start.step)
    note = f"{trouble}: back to step {start.step}, and on with {0.5**rollbacks:g} of the recipe's learning rate"
    for line in [*start.notes, f"{note} ({rollbacks} of --health.rollbacks {recipe.health.rollbacks})"]:
        run.monitor.say(line)
    run.save(start.step, rollbacks)  # so that the rollback counts even if the run is killed next
    return Start(start.step, rollbacks, [])


def find_skipped_steps(recipe: Recipe, row: dict[str, Any]) -> str:
    """Return what is wrong if a row of the log says that too many steps in a row were skipped, else an empty string."""
    skipped = int(row["skipped_in_a_row"])
    return f"the gradients of {skipped} steps in a row were not finite" if skipped >= recipe.health.max_skipped else ""


def find_non_finite_state(done: int, step: TrainStep, ranks: Ranks) -> str:
    """Return what is wrong if the state after `done` steps is not finite on any rank, else an empty string.

    It must not replace a good checkpoint. NaN in a batch does not change the weights, as the step is skipped, but it
    does change the statistics of batch norm. The host waits for the device.
    """
    buffers = [b for network in (step.bare_student, step.teacher) for b in network.buffers() if b.is_floating_point()]
    state = [*step.bare_student.parameters(), *step.teacher.parameters(), *buffers, step.center]
    broken = 1.0 - torch.stack(torch._foreach_norm(state)).isfinite().all().float()
    if ranks.world > 1:
        dist.all_reduce(broken, op=dist.ReduceOp.MAX)
    if not broken:
        return ""
    return f"the weights, the center or batch norm's statistics after step {done} are not finite"
