"""The training run, top to bottom in the order in which it runs; the train command.

One process: `dino-fast train --config FILE`. Many: `torchrun --nproc_per_node N -m dino_fast.train --config FILE`.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dino_fast import checkpoint
from dino_fast.compiled import compile_backbones, why_not
from dino_fast.config import Recipe, UsageError, differences, read_recipe, with_defaults
from dino_fast.distributed import Ranks, join, parallel
from dino_fast.graphed import GraphedStep
from dino_fast.monitor import Monitor
from dino_fast.optim import build_optimizer
from dino_fast.schedules import Schedules
from dino_fast.step import TrainStep, build_student_teacher
from dino_fast.update import KernelUpdate
from pipelines.loader import Loader, open_index
from shards.errors import UserError
from shards.lock import locked

# Up to here a GPU is expected to wait for the host's launches: some 2,000 of 3 µs take as long as 16 images on an H200.
SMALL_BATCH = 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(recipe: Recipe, ranks: Ranks) -> Path:
    """Run the recipe, from its output's newest checkpoint if there is one. Returns the output folder."""
    output = Path(recipe.output)
    torch.backends.cudnn.benchmark = True  # sizes never change
    if recipe.precision != "fp32" and ranks.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # the head's last layer: TF32 has float16's mantissa

    # ---- Data
    index = open_index(recipe.data)
    loader = Loader(
        index, recipe.data, recipe.crops, recipe.augment, batch=recipe.batch_size, seed=recipe.seed,
        device=ranks.device, dtype=DTYPES[recipe.precision], rank=ranks.rank, world=ranks.world,
    )  # fmt: skip

    # ---- Networks, optimizer, schedules
    step = build_step(recipe, ranks)
    compiling = compile_step(recipe, ranks, step)
    run_step = recorded(recipe, ranks, step)
    schedules = Schedules(recipe, loader.order.steps_per_epoch)

    # ---- Where to start, where to stop
    start, notes = resume(recipe, ranks, step, index.fingerprint)
    stop = min(recipe.max_steps or schedules.total_steps, schedules.total_steps)
    every = max(1, schedules.steps(recipe.checkpoint.every))
    milestone = schedules.steps(recipe.checkpoint.keep_every)

    # ---- The loop
    with Monitor(
        output, ranks, batch=recipe.batch_size, steps_per_epoch=schedules.steps_per_epoch, start=start, stop=stop,
        log_every=recipe.log_every,
    ) as monitor:  # fmt: skip
        for note in [*notes, *compiling, *loader.notes]:
            monitor.say(note)
        for batch in loader.batches(start, stop):
            at = schedules.at(batch.step)
            out = run_step(batch.globals, batch.locals, at)
            monitor.tick(batch.step, at, out, loader)
            done = batch.step + 1
            if ranks.first and (done % every == 0 or done == stop or (milestone and done % milestone == 0)):
                require_finite(done, step)
                with monitor.paused():
                    save(recipe, done, step, index.fingerprint, milestone)
    return output


def claimed(recipe: Recipe, ranks: Ranks) -> contextlib.AbstractContextManager[None]:
    """Hold the output folder against another run; the first rank does it for all."""
    if not ranks.first:
        return contextlib.nullcontext()
    return locked(Path(recipe.output), "another run is writing into it; wait, or choose another --output")


def build_step(recipe: Recipe, ranks: Ranks, *, kernels: bool | None = None, teacher_aside: bool = False) -> TrainStep:
    """Student, teacher and optimizer on this rank's device; the first weights depend on the seed alone.

    `kernels` and `teacher_aside` are those of `TrainStep`; kernels None: on a GPU, where Triton is installed.

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
    return TrainStep(
        parallel(student, ranks), teacher, optimizer, recipe.loss, recipe.optim.clip_grad, recipe.precision,
        accumulate=recipe.accumulate, kernels=kernels, teacher_aside=teacher_aside,
    )  # fmt: skip


def compile_step(recipe: Recipe, ranks: Ranks, step: TrainStep) -> list[str]:
    """Have the backbones compiled if the recipe says so and it is possible; what to tell."""
    if recipe.compile == "never" or (recipe.compile == "auto" and ranks.device.type == "cpu"):
        return []
    if problem := why_not(ranks.device):
        return [f"not compiled, which costs speed: {problem}"]
    compile_backbones(step)
    return [
        "the backbones are compiled when they first see a resolution, which takes minutes (--compile never: without)"
    ]


def recorded(recipe: Recipe, ranks: Ranks, step: TrainStep) -> TrainStep | GraphedStep:
    """The step, as a CUDA graph where the recipe says so. UserError where that is not possible."""
    possible = isinstance(step.update, KernelUpdate) and ranks.device.type == "cuda" and ranks.world == 1
    if recipe.graph == "always" and not possible:
        raise UserError("--graph always: that takes one GPU, no other ranks, and Triton; leave it out")
    small = recipe.batch_size // recipe.accumulate <= SMALL_BATCH
    wanted = recipe.graph == "always" or (recipe.graph == "auto" and small)
    return GraphedStep(step) if possible and wanted else step


def resume(recipe: Recipe, ranks: Ranks, step: TrainStep, fingerprint: str) -> tuple[int, list[str]]:
    """Load the newest good checkpoint into `step` on every rank. Returns the next step to run, and what to tell.

    UserError if the checkpoint is of another recipe or data and `accept_changes` is off, or does not fit the networks.
    """
    found: list[Any] = [newest(Path(recipe.output)) if ranks.first else None]
    if ranks.world > 1:
        dist.broadcast_object_list(found, device=ranks.device)
    if found[0] is None:
        return 0, []
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
    return state["step"], [*notes, f"resumed from step {state['step']} of {recipe.output}", *changes]


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


def require_finite(done: int, step: TrainStep) -> None:
    """UserError if a weight or the centre is no number any more: they would replace the last good checkpoint.

    The centre alone can be, where every gradient since was left out for not being finite.
    """
    state = [*step.bare_student.parameters(), *step.teacher.parameters(), step.center]
    if not torch.stack(torch._foreach_norm(state)).isfinite().all():
        raise UserError(
            f"the weights or the centre after step {done} are not finite: lower --optim.lr, or use --precision bf16 or "
            "fp32; the last checkpoint is from before"
        )


def save(recipe: Recipe, done: int, step: TrainStep, fingerprint: str, milestone: int) -> None:
    """Write the checkpoint after `done` steps, then drop those that are no longer kept."""
    output = Path(recipe.output)
    state = {"recipe": plain(recipe), "data": fingerprint, "model": step.state_dict()}
    checkpoint.save(output, done, state)
    checkpoint.prune(output, recipe.checkpoint.keep, milestone)


def plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, as it is stored in checkpoints and would be read from YAML: lists, no tuples."""
    settings: dict[str, Any] = _listed(dataclasses.asdict(recipe))
    return settings


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _listed(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """The train command. Returns its exit status: 0, 1 for a failed run, 2 for a wrong call."""
    try:
        recipe = read_recipe(sys.argv[1:] if arguments is None else arguments)
        with join(recipe.device) as ranks, claimed(recipe, ranks):
            output = train(recipe, ranks)
        if ranks.first:
            last = checkpoint.checkpoints(output)[-1]
            print(f"done: {last}\nnext: dino-fast knn --checkpoint {last} --train {recipe.data.train} --val VAL_SHARDS")
        return 0
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
    except KeyboardInterrupt:
        print("dino-fast train: stopped; the same command again goes on from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    # The loader's threads may stand in DALI: leave without waiting for them.
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status) if status else sys.exit(0)
