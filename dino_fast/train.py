"""The training run, top to bottom in the order in which it runs; the train command.

One process: `dino-fast train --config FILE`. Many: `torchrun --nproc_per_node N -m dino_fast.train --config FILE`.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dino_fast.config import Recipe, read_recipe
from dino_fast.config_help import print_help_if_asked
from dino_fast.distributed import Ranks, drop_local_rank, join_ranks
from dino_fast.run import build, command, crop_sheet, drop_path, health, resume, scores, signals
from dino_fast.run.checkpoint_writer import open_checkpoint_writer
from dino_fast.run.monitor import open_monitor
from dino_fast.run.schedules import Schedules
from dino_fast.run.training_run import End, Start, TrainingRun
from dino_fast.step.compiled import report_recompile_limit
from dino_fast.step.precision import set_up_math
from dino_fast.step.recorded import RecordedStep
from shards.text import escape_unprintable


def train(recipe: Recipe, ranks: Ranks) -> Path:
    """Run the recipe, from its output's newest checkpoint if there is one. Returns the output folder.

    Raises signals.StoppedBySignal where SIGTERM or SIGUSR1 ended the run before its end.
    """
    output = Path(recipe.output)
    set_up_math(recipe.precision, ranks.device)

    # ---- Data
    index, loader = build.open_data(recipe, ranks)
    schedules = Schedules(recipe, loader.order.steps_per_epoch)
    knn = scores.open_knn(recipe, ranks)

    # ---- Networks, optimizer
    step = build.build_train_step(recipe, ranks)
    warnings = [*build.warn_of_slow_precision(recipe, ranks), *build.warn_of_idle_gpus(ranks)]
    notes = [*warnings, *build.compile_if_useful(recipe, ranks, step)]
    recorded = build.should_record(recipe, ranks, step)

    # ---- Where to start, where to stop
    start = resume.resume_run(recipe, ranks, step, index.fingerprint) or resume.start_run(recipe, ranks, step)
    stop = min(recipe.max_steps or schedules.total_steps, schedules.total_steps)

    # ---- The steps, once through, unless the run has to go back to a checkpoint
    with (
        signals.StopSignal(ranks, recipe.timeout) as signal,
        open_monitor(recipe, ranks, schedules, step, start.step, stop) as monitor,
        open_checkpoint_writer(recipe, ranks, schedules, monitor.say) as writer,
        report_recompile_limit(monitor.say),
    ):
        if not start.step:
            monitor.say(describe_run(recipe, ranks, len(index), schedules, stop))
        for note in [*start.notes, *notes, *loader.notes]:
            monitor.say(note)
        run = TrainingRun(
            recipe, ranks, loader, schedules, step, recorded, stop, knn, signal, monitor, writer, index.fingerprint
        )
        end = train_from(run, start)
        while end.trouble:
            start = resume.roll_back(run, start, end.trouble)
            end = train_from(run, start)
    if end.stopped_by_signal and end.done < stop:
        raise signals.StoppedBySignal(f"stopped by a signal after step {end.done}")
    return output


def train_from(run: TrainingRun, start: Start) -> End:
    """Train from `start` up to the run's last step, a signal, or trouble."""
    recipe, ranks, monitor = run.recipe, run.ranks, run.monitor
    train_step = RecordedStep(run.step) if run.recorded else run.step  # tied to the tensors that exist now
    # Start with fresh alarms: a rollback may have removed the cause of the old ones.
    alarms = health.CollapseAlarms(recipe.head.out_dim, recipe.batch_size // ranks.world)
    end = End(start.step, "", stopped_by_signal=False)
    with contextlib.closing(run.loader.batches(start.step, run.stop)) as batches:
        for batch in batches:
            crop_sheet.save_first_crops(run, batch)
            hyper = run.schedules.at(batch.step, start.rollbacks)
            scales = drop_path.draw_scales(recipe, batch.step, batch.ids, ranks.device)
            output = train_step(batch.globals, batch.locals, hyper, scales)
            figures = health.collect_figures(run.step, batch.globals, hyper) if monitor.is_due(batch.step) else {}
            row = monitor.tick(batch.step, hyper, output, run.loader, figures)
            end = End(batch.step + 1, "", run.signal.all_ranks_stop())
            if row is not None:
                for alarm in alarms.check(row):
                    monitor.say(alarm)
                health.require_gradients(row, monitor.find_without_gradient(health.GRADIENT_STEPS), run.step)
                end = end._replace(trouble=find_trouble(run, end.done, row))
            end = save_if_due(run, end, start.rollbacks)
            if end.trouble or (end.stopped_by_signal and end.done < run.stop):
                break
            scores.log_knn_if_due(run, end.done)
    return end


def find_trouble(run: TrainingRun, done: int, row: dict[str, Any]) -> str:
    """Check a row of the log after `done` steps. Returns what is wrong, or an empty string."""
    if trouble := resume.find_skipped_steps(run.recipe, row):
        return trouble
    return resume.find_non_finite_state(done, run.step, run.ranks) if row["skipped"] else ""


def save_if_due(run: TrainingRun, end: End, rollbacks: int) -> End:
    """Save a checkpoint if one is due, after the last step, or after a signal.

    If there is trouble, or the state is not finite, nothing is saved, and the trouble is in the End that is returned.
    """
    if not (run.schedules.checkpoint_is_due(end.done) or end.done == run.stop or end.stopped_by_signal):
        return end
    trouble = end.trouble or resume.find_non_finite_state(end.done, run.step, run.ranks)
    if not trouble:
        run.save(end.done, rollbacks)
    return end._replace(trouble=trouble)


def describe_run(recipe: Recipe, ranks: Ranks, images: int, schedules: Schedules, stop: int) -> str:
    """Return a line that says what begins."""
    where = f"{ranks.world} ranks on {ranks.device.type}" if ranks.world > 1 else str(ranks.device)
    return (
        f"{recipe.backbone} on {images:,} images of {recipe.data.train}, {stop:,} steps of {recipe.batch_size:,}, "
        f"{schedules.steps_per_epoch:,} an epoch, in {recipe.precision} on {where}, into {recipe.output}"
    )


# ---- The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the train command. Returns its exit status: 0, 1 for a failed run, 2 for a wrong call, 85 after a signal.

    After Ctrl-C it is 130.
    """
    arguments = drop_local_rank(sys.argv[1:] if arguments is None else arguments)
    if print_help_if_asked("dino-fast train", arguments):
        return 0
    recipe: Recipe | None = None
    try:
        recipe = read_recipe(arguments)
        with (
            signals.exit_at_signal_during_setup(),
            join_ranks(recipe.device, recipe.timeout) as ranks,
            command.lock_output(recipe, ranks),
        ):
            output = train(recipe, ranks)
        if ranks.first:
            command.print_end(output)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        status, message = command.explain_error(error, recipe)
        print(f"dino-fast train: {escape_unprintable(message)}", file=sys.stderr)
        return status


if __name__ == "__main__":
    command.accept_any_encoding()
    command.exit_process(main())
