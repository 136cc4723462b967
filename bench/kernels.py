"""Measure the loss and the update of a step alone: our kernels beside torch's operations and the published loops.

    python -m bench.kernels
    python -m bench.kernels --batch 64 --only "loss fp32: torch" "loss fp32: copy" --json bench/results/kernels.jsonl

"loss" arms take random logits [8·B, K] and [2·B, K]. They compute the loss, its gradient by the student's logits, and
the new center. "published" has a log-softmax for each pair of views, "einsum" one for each view (bench/baselines.py),
"torch" is dino_fast.step.loss, and "triton" is its kernels. "update" arms clip random gradients of the network, make an
SGD step and average the teacher. "copy" arms move as many bytes within the device's memory as an ideal kernel would.
For the loss it reads the student's logits twice, writes them once, and reads the teacher's logits twice. For the update
it moves 32 bytes for each parameter, and 4 more for each one that both networks also keep in half precision. The
figures of a round over --iterations:

- time: µs as a loop sees it, with the launches;
- device: µs that a GPU alone takes, since the launches are made ahead (a recorded step has none). An arm that waits for
  the GPU includes its launches here, too;
- copy share: the copy's time on the device over the arm's, in percent.

Logits are float32, as in bf16 and fp32 runs. On a GPU they are also float16, as in fp16 runs. "triton" needs a GPU.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from bench.baselines import Published, Stock
from bench.records import add_run_arguments, make_records, report, save_partial
from bench.step_recipe import choose_device, make_steady_hyper
from bench.timing import Figures, attempt, measure_device_time, print_left_out, read_clock, run_interleaved
from dino_fast.config import Recipe
from dino_fast.distributed import Ranks
from dino_fast.model.head import HeadRecipe
from dino_fast.model.student_teacher import build_student_teacher
from dino_fast.run.build import build_train_step
from dino_fast.step.loss import CenterUpdate
from dino_fast.step.train_step import TrainStep
from pipelines.crops import CropRecipe

UNITS = {"time": "µs", "device": "µs", "copy share": "%"}
VIEWS = 8
# Bytes that an update must move for each parameter. The gradient is read twice. Weight, momentum and teacher are read
# and written. Both networks also write it in half precision, except in the last layer and the norms.
UPDATE_BYTES, HALF_BYTES = 32, 4

Work = Callable[[], object]


def build_loss_arms(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> dict[str, Work]:
    """Return the arms of the loss for logits of `dtype`. Their networks do not run, and have a small backbone."""
    prefix = "loss fp16" if dtype == torch.float16 else "loss fp32"
    small = Recipe(backbone="resnet18", batch_size=recipe.batch_size, head=recipe.head, crops=recipe.crops)
    rows, width = VIEWS * recipe.batch_size, recipe.head.out_dim
    student = (2 * torch.rand(rows, width, device=device) - 1).to(dtype)
    teacher = (2 * torch.rand(2 * recipe.batch_size, width, device=device) - 1).to(dtype)
    pair = build_student_teacher(small.backbone, small.head)
    arms: dict[str, Work] = {f"{prefix}: copy": make_copy((3 * student.nbytes + 2 * teacher.nbytes) // 2, device)}
    for name, kind in (("published", Published), ("einsum", Stock)):
        step = kind(small, pair, make_steady_hyper(small), device)
        arms[f"{prefix}: {name}"] = partial(run_baseline_loss, step, student, teacher)
    for name, kernels in list_our_arms(device).items():
        ours = build_train_step(small, Ranks(0, 1, device), kernels=kernels)
        arms[f"{prefix}: {name}"] = partial(run_our_loss, ours, student.clone(), teacher)
    return arms


def run_baseline_loss(step: Published | Stock, student: Tensor, teacher: Tensor) -> None:
    """Compute a baseline's loss, its gradient and the new center.

    The published loss of float16 logits runs under autocast, which computes its softmaxes in float32.
    """
    logits = student.detach().requires_grad_()
    wide = isinstance(step, Stock)
    half = student.dtype == torch.float16 and not wide
    with torch.autocast(student.device.type, torch.float16, enabled=half):
        loss = step.loss(logits.float() if wide else logits, teacher.float() if wide else teacher, VIEWS)
    loss.backward()
    if isinstance(step, Stock):  # the published loss moves the center itself
        step.center.lerp_(teacher.float().mean(dim=0, keepdim=True), 1 - step.recipe.loss.center_momentum)


def run_our_loss(step: TrainStep, student: Tensor, teacher: Tensor) -> None:
    """Compute our loss, its gradient and the new center.

    The kernel writes its gradient over the logits, and the next iteration takes these as logits. No time depends on
    their values.
    """
    logits = student.detach().requires_grad_()
    temp = step.prepare(make_steady_hyper(Recipe())).teacher_temp
    result = step.objective(logits, teacher, step.center, step.loss.student_temp, temp, VIEWS)
    center = CenterUpdate(step.center, result.teacher_mean, step.loss.center_momentum)
    result.loss.backward()
    center.finish()


def build_update_arms(recipe: Recipe, device: torch.device) -> dict[str, Work]:
    """Return the arms of the update."""
    torch.manual_seed(0)
    pair = build_student_teacher(recipe.backbone, recipe.head)
    count = sum(parameter.numel() for parameter in pair[0].parameters())
    halves = [layer.weight.numel() for layer in pair[0].modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    arms: dict[str, Work] = {"update: copy": make_copy((UPDATE_BYTES * count + HALF_BYTES * sum(halves)) // 2, device)}
    for name, kind in (("published", Published), ("stock", Stock)):
        step = kind(recipe, pair, make_steady_hyper(recipe), device)
        set_random_gradients(step.student)
        arms[f"update: {name}"] = partial(run_baseline_update, step)
    for name, kernels in list_our_arms(device).items():
        ours = build_train_step(recipe, Ranks(0, 1, device), kernels=kernels)
        set_random_gradients(ours.bare_student)
        arms[f"update: {name}"] = partial(run_our_update, ours)
    return arms


def run_baseline_update(step: Published | Stock) -> None:
    """Run a baseline's update."""
    if step.scaler.is_enabled():
        step.scaler.scale(torch.ones((), device=step.device))  # creates the scaler's state, as a loss would
    step.update()


def run_our_update(step: TrainStep) -> None:
    """Run our update."""
    step.update(step.prepare(make_steady_hyper(Recipe())), step.loss_scale)


def set_random_gradients(network: nn.Module) -> None:
    """Give every trained parameter a random gradient."""
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)


def list_our_arms(device: torch.device) -> dict[str, bool]:
    """Return the names of our arms, and whether they use kernels. Prints which are left out."""
    if device.type == "cuda":
        return {"torch": False, "triton": True}
    print_left_out("triton", "there is no GPU")
    return {"torch": False}


def make_copy(size: int, device: torch.device) -> Work:
    """Return a function that reads and writes `size` bytes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    return partial(torch.zeros_like(source).copy_, source)


def measure_round(work: Work, iterations: int, device: torch.device) -> Figures:
    """Return time, and on a GPU device. One call is not counted."""
    work()
    start = read_clock(device)
    for _ in range(iterations):
        work()
    figures = {"time": 1e6 * (read_clock(device) - start) / iterations}
    return figures | ({"device": 1e6 * measure_device_time(work, iterations, device)} if device.type == "cuda" else {})


def add_shares(rounds: dict[str, list[Figures]]) -> None:
    """Add each arm's share of the copy of the same kind and the same round."""
    for name, of_arm in rounds.items():
        copies = rounds.get(f"{name.partition(':')[0]}: copy")
        for figure, plain in zip(of_arm, copies or [], strict=False):
            kind = "device" if "device" in figure else "time"
            figure["copy share"] = 100 * plain[kind] / figure[kind]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128 if gpu else 8, help="images in a step (default %(default)s)")
    parser.add_argument("--backbone", default="resnet50", metavar="NAME", help="of the update (resnet50)")
    parser.add_argument("--prototypes", type=int, default=65536, help="outputs of the head, K (65536)")
    parser.add_argument(
        "--iterations", type=int, default=20 if gpu else 2, help="calls in a round (default %(default)s)"
    )
    parser.add_argument("--only", nargs="+", metavar="ARM", help="arms to measure; all by default")
    add_run_arguments(parser, rounds=5)
    return parser.parse_args()


def main() -> None:
    """Measure the arms, and report their records."""
    options = parse_arguments()
    device = choose_device()
    head = HeadRecipe(out_dim=options.prototypes)
    recipe = Recipe(crops=CropRecipe(locals=VIEWS - 2), head=head, backbone=options.backbone, batch_size=options.batch)
    works = attempt("update", partial(build_update_arms, recipe, device)) or {}
    for dtype in (torch.float32, torch.float16) if device.type == "cuda" else (torch.float32,):
        works |= attempt(f"loss, {dtype}", partial(build_loss_arms, recipe, device, dtype)) or {}
    arms = {
        name: partial(measure_round, work, options.iterations, device)
        for name, work in works.items()
        if options.only is None or name in options.only
    }
    rounds = run_interleaved(arms, options.rounds, partial(save_partial, "kernels", UNITS, options.json))
    add_shares(rounds)
    print(f"batches of {options.batch}, K = {recipe.head.out_dim}, {options.backbone} on {device}")
    report(make_records("kernels", UNITS, rounds), options.json)


if __name__ == "__main__":
    main()
