"""The training run, top to bottom in the order in which it runs; the train command.

One process: `dino-fast train --config FILE`. Many: `torchrun --nproc_per_node N -m dino_fast.train --config FILE`.
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from dino_fast import checkpoint
from dino_fast.config import Recipe, UsageError, differences, read_recipe, with_defaults
from dino_fast.distributed import Ranks, join, lost_rank, parallel
from dino_fast.evaluate.online import OnlineKnn
from dino_fast.model.flops import flops_an_image
from dino_fast.run.crop_sheet import write_crop_sheet
from dino_fast.run.health import PICTURES, Alarms, probe
from dino_fast.run.initial_weights import initialise
from dino_fast.run.monitor import Monitor
from dino_fast.run.schedules import Hyper, Schedules
from dino_fast.run.signals import PREEMPTED, StopSignal, nothing_to_lose
from dino_fast.step.compiled import compile_backbones, why_not
from dino_fast.step.optimizers import build_optimizer
from dino_fast.step.recorded import GraphedStep
from dino_fast.step.train_step import Precision, TrainStep, build_student_teacher
from dino_fast.step.update import KernelUpdate
from pipelines.loader import Batch, Loader, open_index
from shards.errors import UserError
from shards.storage.lock import locked

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Preempted(UserError):
    """The run was told to stop, and its checkpoint is written."""


class Start(NamedTuple):
    """Where a run begins, or goes on after it went back."""

    step: int
    rollbacks: int
    """how often the run has gone back to a checkpoint so far, each time for half the learning rate"""
    notes: list[str]
    """what to tell"""


class Ending(NamedTuple):
    """How training from some step on ended."""

    done: int
    """steps of the run"""
    trouble: str
    """why the run must go back to a checkpoint; empty: it need not"""
    told: bool
    """by a signal"""


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run, put together."""

    recipe: Recipe
    ranks: Ranks
    loader: Loader
    schedules: Schedules
    step: TrainStep
    graphed: bool
    """whether steps are recorded as a CUDA graph"""
    stop: int
    """steps when it is over"""
    knn: OnlineKnn | None
    stopping: StopSignal
    monitor: Monitor
    writer: checkpoint.Writer | None
    """of checkpoints; only the first rank has one"""
    fingerprint: str
    """of the data"""


def train(recipe: Recipe, ranks: Ranks) -> Path:
    """Run the recipe, from its output's newest checkpoint if there is one. Returns the output folder.

    Raises Preempted where SIGTERM or SIGUSR1 ended the run before its end.
    """
    output = Path(recipe.output)
    set_up_math(recipe.precision, ranks.device)

    # ---- Data
    index = open_index(recipe.data)
    loader = Loader(
        index, recipe.data, recipe.crops, recipe.augment, batch=recipe.batch_size, seed=recipe.seed,
        device=ranks.device, dtype=DTYPES[recipe.precision], rank=ranks.rank, world=ranks.world,
    )  # fmt: skip
    schedules = Schedules(recipe, loader.order.steps_per_epoch)
    knn = OnlineKnn(recipe.knn, recipe.crops.global_size, ranks) if recipe.knn.on else None

    # ---- Networks, optimizer
    step = build_step(recipe, ranks)
    compiling = compile_step(recipe, ranks, step)
    graphed = wants_graph(recipe, ranks, step)

    # ---- Where to start, where to stop
    start = resume(recipe, ranks, step, index.fingerprint) or first_start(recipe, ranks, step)
    stop = min(recipe.max_steps or schedules.total_steps, schedules.total_steps)
    names = [name for name, _ in step.bare_student.named_parameters()]

    # ---- The steps, once through, unless the run has to go back to a checkpoint
    with (
        StopSignal(ranks, recipe.timeout) as stopping,
        Monitor(
            output, ranks, batch=recipe.batch_size, steps_per_epoch=schedules.steps_per_epoch, start=start.step,
            stop=stop, log_every=recipe.log_every, parameters=names, flops_per_image=flops_an_image(recipe),
            wandb=recipe.wandb, settings=plain(recipe),
        ) as monitor,
        written(recipe, ranks, schedules.steps(recipe.checkpoint.keep_every), monitor) as writer,
    ):  # fmt: skip
        if not start.step:
            monitor.say(outline(recipe, ranks, len(index), schedules, stop))
        for note in [*start.notes, *slow_precision(recipe, ranks), *compiling, *loader.notes]:
            monitor.say(note)
        run = Run(
            recipe, ranks, loader, schedules, step, graphed, stop, knn, stopping, monitor, writer, index.fingerprint
        )
        end = train_from(run, start)
        while end.trouble:
            start = roll_back(run, start, end.trouble)
            end = train_from(run, start)
    if end.told and end.done < stop:
        raise Preempted(f"stopped by a signal after step {end.done}")
    return output


def train_from(run: Run, start: Start) -> Ending:
    """Train from `start` up to the run's last step, a signal, or trouble."""
    recipe, ranks, step, monitor = run.recipe, run.ranks, run.step, run.monitor
    run_step = GraphedStep(step) if run.graphed else step  # a recording knows the tensors of now
    # New ones: what was wrong before the run went back need not be so again.
    alarms = Alarms(recipe.head.out_dim, min(PICTURES, recipe.batch_size // ranks.world))
    save_every = max(1, run.schedules.steps(recipe.checkpoint.every))
    keep_every = run.schedules.steps(recipe.checkpoint.keep_every)
    score_every = max(1, run.schedules.steps(recipe.knn.every))
    done, trouble, told = start.step, "", False
    with contextlib.closing(run.loader.batches(start.step, run.stop)) as batches:
        for batch in batches:
            show_crops(run, batch)
            at = run.schedules.at(batch.step, start.rollbacks)
            out = run_step(batch.globals, batch.locals, at)
            figures = seen(step, batch.globals, at) if monitor.due(batch.step) else {}
            row = monitor.tick(batch.step, at, out, run.loader, figures)
            done, last = batch.step + 1, batch.step + 1 == run.stop
            told = run.stopping.agreed()
            if row is not None:
                trouble = skipping(recipe, row) or (not_finite(done, step, ranks) if row["skipped"] else "")
                for alarm in alarms.check(row):
                    monitor.say(alarm)
            if done % save_every == 0 or (keep_every and done % keep_every == 0) or last or told:
                trouble = trouble or not_finite(done, step, ranks)
                if not trouble:
                    save(run, done, start.rollbacks)
            if trouble or (told and not last):
                break
            if run.knn is not None and (done % score_every == 0 or last):
                score(run.knn, step, batch.step, monitor)
    return Ending(done, trouble, told)


def set_up_math(precision: Precision, device: torch.device) -> None:
    """How a GPU computes: the fastest convolutions, found by trying, since sizes never change; in bf16 and fp16 runs
    what stays float32 (bf16's last layer) as TF32, which has float16's mantissa, and sums of float16 products in
    float32 throughout: over 65536 prototypes they are long."""
    torch.backends.cudnn.benchmark = True
    if precision == "fp32" or device.type != "cuda":
        return
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@contextlib.contextmanager
def claimed(recipe: Recipe, ranks: Ranks) -> Iterator[None]:
    """Hold the output folder against another run; the first rank does it for all. A new one in which nothing was
    written is removed again."""
    if not ranks.first:
        yield
        return
    output = Path(recipe.output)
    new = not output.exists()
    try:
        with locked(output, "another run is writing into it; wait, or choose another --output"):
            yield
    finally:
        if new:
            with contextlib.suppress(OSError):
                output.rmdir()


def build_step(
    recipe: Recipe,
    ranks: Ranks,
    *,
    kernels: bool | None = None,
    fused_norms: bool | None = None,
    teacher_aside: bool = False,
) -> TrainStep:
    """Student, teacher and optimizer on this rank's device; the first weights depend on the seed alone.

    `kernels`, `fused_norms` and `teacher_aside` are those of `TrainStep`; kernels None: on a GPU, where Triton is
    installed; fused_norms None: where steps are recorded, unless the recipe says that the backbones are compiled.

    Raises UserError for a batch that does not divide into ranks and parts.
    """
    if recipe.batch_size % (ranks.world * recipe.accumulate):
        raise UserError(
            f"--batch_size {recipe.batch_size} does not divide into {ranks.world} ranks with --accumulate "
            f"{recipe.accumulate} parts each: choose one that does"
        )
    torch.manual_seed(recipe.seed)
    student, teacher = build_student_teacher(recipe.backbone, recipe.head)
    student.to(ranks.device)
    teacher.to(ranks.device)
    optimizer = build_optimizer(recipe.optim, student)
    if kernels is None:
        kernels = ranks.device.type == "cuda" and find_spec("triton") is not None
    if fused_norms is None:
        # Launched one by one they keep the host busy for longer than what a compiler makes of torch's.
        recorded = kernels and ranks.world == 1 and recipe.graph != "never"
        fused_norms = recorded and recipe.compile != "always"
    return TrainStep(
        parallel(student, ranks), teacher, optimizer, recipe.loss, recipe.optim.clip_grad, recipe.precision,
        accumulate=recipe.accumulate, kernels=kernels, fused_norms=fused_norms, teacher_aside=teacher_aside,
    )  # fmt: skip


def compile_step(recipe: Recipe, ranks: Ranks, step: TrainStep) -> list[str]:
    """Have the backbones compiled if the recipe says so and it is possible; what to tell."""
    needless = step.fused_norms or ranks.device.type == "cpu"
    if recipe.compile == "never" or (recipe.compile == "auto" and needless):
        return []
    if problem := why_not(ranks.device):
        return [f"not compiled, which costs speed: {problem}"]
    compile_backbones(step)
    return [
        "the backbones are compiled when they first see a resolution, which takes minutes (--compile never: without)"
    ]


def outline(recipe: Recipe, ranks: Ranks, pictures: int, schedules: Schedules, stop: int) -> str:
    """What begins, in a line."""
    where = f"{ranks.world} ranks on {ranks.device.type}" if ranks.world > 1 else str(ranks.device)
    return (
        f"{recipe.backbone} on {pictures:,} pictures of {recipe.data.train}, {stop:,} steps of {recipe.batch_size:,}, "
        f"{schedules.steps_per_epoch:,} an epoch, in {recipe.precision} on {where}, into {recipe.output}"
    )


def slow_precision(recipe: Recipe, ranks: Ranks) -> list[str]:
    """What to tell about the recipe's precision on this device."""
    if recipe.precision == "fp16" and ranks.device.type == "cpu":
        return ["fp16 is emulated on CPUs, many times slower than fp32: pass --precision fp32"]
    return []


def wants_graph(recipe: Recipe, ranks: Ranks, step: TrainStep) -> bool:
    """Whether steps are recorded as a CUDA graph. UserError where the recipe says so and it is not possible."""
    possible = isinstance(step.update, KernelUpdate) and ranks.device.type == "cuda" and ranks.world == 1
    if recipe.graph == "always" and not possible:
        raise UserError("--graph always: that takes one GPU, no other ranks, and Triton; leave it out")
    return possible and recipe.graph != "never"


def resume(recipe: Recipe, ranks: Ranks, step: TrainStep, fingerprint: str) -> Start | None:
    """Load the newest good checkpoint into `step` on every rank; None if there is none.

    UserError if the checkpoint is of another recipe or data and `accept_changes` is off, or does not fit the networks.
    """
    found: list[Any] = [newest(Path(recipe.output)) if ranks.first else None]
    if ranks.world > 1:
        dist.broadcast_object_list(found, device=ranks.device)
    if found[0] is None:
        return None
    state, notes = found[0]
    changes = list(differences(with_defaults(state["recipe"], plain(Recipe())), plain(recipe)))
    if state["data"] != fingerprint:
        changes.append(f"data.train: {recipe.data.train} holds other data than the run began with")
    what = f"--output {recipe.output} holds a run of another recipe ({'; '.join(changes)})"
    if changes and not recipe.accept_changes:
        raise UserError(f"{what}: undo that, choose another --output, or pass --accept_changes true")
    try:
        step.load_state_dict(state["model"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"{what}, whose state does not fit this one's: choose another --output") from error
    # Who has changed the optimizer or the precision has mended what led to rollbacks.
    mended = any(change.startswith(("optim.", "precision:")) for change in changes)
    rollbacks = 0 if mended else state.get("rollbacks", 0)
    rate = f", at {0.5**rollbacks:g} of the recipe's learning rate after {rollbacks} rollbacks" if rollbacks else ""
    notes = [*notes, f"resumed from step {state['step']} of {recipe.output}{rate}", *changes]
    return Start(state["step"], rollbacks, notes)


def newest(output: Path) -> tuple[dict[str, Any], list[str]] | None:
    """The newest good checkpoint's state and what to tell. Damaged ones are put aside, so that they do not count among
    those that are kept."""
    found = checkpoint.load_newest(output)
    if found is None:
        return None
    state, damaged = found
    for path in damaged:
        path.rename(path.with_name(f"damaged-{path.name}"))
    return state, [f"{path} is damaged: put aside, and the one before is used" for path in damaged]


def first_start(recipe: Recipe, ranks: Ranks, step: TrainStep) -> Start:
    """The beginning of a new run, from other weights where the recipe names some: the first rank reads them for all."""
    if not recipe.init_from:
        return Start(0, 0, [])
    notes = initialise(step, Path(recipe.init_from)) if ranks.first else []
    if ranks.world > 1:
        networks = step.bare_student.state_dict(), step.teacher.state_dict()
        for tensor in (*networks[0].values(), *networks[1].values(), step.center):
            dist.broadcast(tensor, 0)
        step.update.loaded()
    return Start(0, 0, notes)


def roll_back(run: Run, before: Start, trouble: str) -> Start:
    """Go back to the newest good checkpoint, and on from there with half the learning rate: the same batches at the
    same rate would end the same way. UserError where that was done too often, or there is no checkpoint."""
    recipe = run.recipe
    mend = "lower --optim.lr, or use --precision bf16 or fp32, and pass --accept_changes true"
    if before.rollbacks >= recipe.health.rollbacks:
        raise UserError(f"{trouble}: {mend}; the last checkpoint is from before")
    if run.writer is not None:
        run.writer.settle()
    start = resume(recipe, run.ranks, run.step, run.fingerprint)
    if start is None:
        raise UserError(f"{trouble}: {mend}; there was no checkpoint yet to go back to")
    rollbacks = before.rollbacks + 1
    run.monitor.restart(start.step)
    note = f"{trouble}: back to step {start.step}, and on with {0.5**rollbacks:g} of the recipe's learning rate"
    for line in [*start.notes, f"{note} ({rollbacks} of --health.rollbacks {recipe.health.rollbacks})"]:
        run.monitor.say(line)
    save(run, start.step, rollbacks)  # so that it is remembered, however the run goes on
    return Start(start.step, rollbacks, [])


def save(run: Run, done: int, rollbacks: int) -> None:
    """Have the checkpoint after `done` steps written; the clock stands while the state is copied."""
    if run.writer is not None:
        with run.monitor.paused():
            run.writer.save(done, state_of(run.recipe, run.step, run.fingerprint, rollbacks))


def show_crops(run: Run, batch: Batch) -> None:
    """Write the sheet of a batch's crops, if the recipe wants one and there is none yet."""
    if not (run.recipe.dump_crops and run.ranks.first):
        return
    sheet = Path(run.recipe.output) / "crops.png"
    if not sheet.exists():
        write_crop_sheet(sheet, batch.globals, batch.locals, len(batch.ids))


def seen(step: TrainStep, globals_: Tensor, at: Hyper) -> dict[str, float | Tensor]:
    """What a log tells besides the step's own figures: a look at targets and features, the step's parts,
    and the loss scale in fp16."""
    parts = {f"{part}_ms": milliseconds for part, milliseconds in step.clock.read().items()}
    scale = {} if step.loss_scale is None else {"loss_scale": step.loss_scale.scale}
    return {**parts, **scale, **probe(step, globals_, at.teacher_temp)._asdict()}


def score(knn: OnlineKnn, step: TrainStep, number: int, monitor: Monitor) -> None:
    """Record the teacher's k-NN score, while the clock stands, and the seconds that it took. A picture that cannot be
    read costs the score, not the run."""
    begin = time.monotonic()
    try:
        with monitor.paused():
            top1 = knn.score(step.teacher.backbone)
        seconds = time.monotonic() - begin
        monitor.record(number, {"knn_top1": top1, "knn_s": seconds})
        monitor.say(
            f"after step {number + 1}: k-NN top-1 {top1:.2f} % of {knn.classified:,} pictures, in {seconds:.1f} s"
        )
    except UserError as error:
        monitor.say(f"no k-NN score after step {number + 1}: {error}")


def skipping(recipe: Recipe, row: dict[str, Any]) -> str:
    """What is wrong if too many steps in a row were skipped, by a row of the log; or nothing."""
    skipped = int(row["skipped_in_a_row"])
    return f"the gradients of {skipped} steps in a row were not finite" if skipped >= recipe.health.max_skipped else ""


def not_finite(done: int, step: TrainStep, ranks: Ranks) -> str:
    """What is wrong if the state after `done` steps holds what is no number, on any rank, or nothing. The host waits
    for the device.

    Such a state would replace the last good checkpoint. A batch that is not finite leaves the weights alone, but not
    the statistics of batch norm.
    """
    buffers = [b for network in (step.bare_student, step.teacher) for b in network.buffers() if b.is_floating_point()]
    state = [*step.bare_student.parameters(), *step.teacher.parameters(), *buffers, step.center]
    broken = 1.0 - torch.stack(torch._foreach_norm(state)).isfinite().all().float()
    if ranks.world > 1:
        dist.all_reduce(broken, op=dist.ReduceOp.MAX)
    if not broken:
        return ""
    return f"the weights, the centre or batch norm's statistics after step {done} are not finite"


@contextlib.contextmanager
def written(recipe: Recipe, ranks: Ranks, keep_every: int, monitor: Monitor) -> Iterator[checkpoint.Writer | None]:
    """The first rank's writer of checkpoints, None on the others. At the end what it was given is on the disk."""
    if not ranks.first:
        yield None
        return
    writer = checkpoint.Writer(Path(recipe.output), recipe.checkpoint.keep, keep_every, monitor.say)
    try:
        yield writer
    except BaseException:
        writer.abandon()
        raise
    writer.close()


def state_of(recipe: Recipe, step: TrainStep, fingerprint: str, rollbacks: int) -> dict[str, Any]:
    """What a checkpoint holds."""
    return {"recipe": plain(recipe), "data": fingerprint, "rollbacks": rollbacks, "model": step.state_dict()}


def plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, as it is stored in checkpoints and would be read from YAML: lists, no tuples."""
    settings: dict[str, Any] = _listed(dataclasses.asdict(recipe))
    return settings


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _listed(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """The train command. Returns its exit status: 0, 1 for a failed run, 2 for a wrong call, PREEMPTED."""
    recipe: Recipe | None = None
    try:
        recipe = read_recipe(sys.argv[1:] if arguments is None else arguments)
        with nothing_to_lose(), join(recipe.device, recipe.timeout) as ranks, claimed(recipe, ranks):
            output = train(recipe, ranks)
        if ranks.first:
            last = checkpoint.checkpoints(output)[-1]
            with contextlib.suppress(OSError):
                print(f"done: {last}")
                print(f"next, with labelled shards: dino-fast knn --checkpoint {output} --train SHARDS --val SHARDS")
        return 0
    except Preempted as stop:
        print(f"dino-fast train: {stop}; the same command again goes on", file=sys.stderr)
        return PREEMPTED
    except (UserError, TimeoutError) as error:
        print(f"dino-fast train: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"dino-fast train: {what}; mend that, and the same command again goes on", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError:
        print("dino-fast train: out of GPU memory: pass --accumulate 2 or more, or use more GPUs", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not lost_rank(error):
            raise
        reason = str(error).splitlines()[0]
        print(
            f"dino-fast train: another rank has ended, or was silent for --timeout seconds ({reason}): its own output "
            "says why; the same command again goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        saved = checkpoint.checkpoints(Path(recipe.output)) if recipe else []
        where = f"goes on from step {checkpoint.step_of(saved[-1])}" if saved else "begins anew: there is no checkpoint"
        print(f"dino-fast train: stopped; the same command again {where}", file=sys.stderr)
        return 130


def leave(status: int) -> NoReturn:
    """End the process: after an error without waiting for the loader's threads, which may stand in DALI, and with the
    run's status though what it printed to is full."""
    lost = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            lost = True
    if status or lost:
        os._exit(status)
    sys.exit(0)


if __name__ == "__main__":
    leave(main())
