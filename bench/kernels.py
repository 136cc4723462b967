"""The loss and the update of a step by themselves: our kernels beside torch's operations and the published loops.

    python -m bench.kernels [--batch 128] [--backbone resnet50] [--prototypes 65536] [--iterations 20] [--rounds 5]
                            [--only ARM ...] [--json bench/results/X.jsonl]

"loss" arms make the loss, its gradient by the student's logits, and the centre's new value from random logits
[8·B, K] and [2·B, K]: "published" by a log-softmax a pair, "einsum" by one a view (`bench/baselines.py`),
"torch" by `dino_fast.step.loss`, "triton" by its kernels. "update" arms clip random gradients of the network, step
SGD and average the teacher. "copy" arms move as many bytes within the device's memory as an ideal kernel would: student
logits read twice and written once, teacher logits read twice, in the logits' type; 32 bytes a parameter, and 4 more of
what both networks keep in half precision. Figures of a round, over --iterations:

- time: µs as a loop sees it, launches included;
- device: µs that a GPU takes alone, the launches being made ahead (a recorded step has none); an arm that waits for the
  GPU shows its launches here too;
- copy share: the copy's time on the device over the arm's, in percent.

Logits are float32, as in bf16 and fp32 runs, and on a GPU float16 too, as in fp16 runs. Triton needs a GPU here.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.baselines import Published, Stock
from bench.roofline import finished
from bench.step import choose_device, steady
from bench.timing import attempt, device_time, interleaved, keep_records, records, report
from dino_fast.config import Recipe
from dino_fast.distributed import Ranks
from dino_fast.model.head import HeadRecipe
from dino_fast.step.loss import CenterUpdate
from dino_fast.step.train_step import TrainStep, build_student_teacher
from dino_fast.train import build_step
from pipelines.crops import CropRecipe

UNITS = {"time": "µs", "device": "µs", "copy share": "%"}
VIEWS = 8
# A parameter's: gradient twice; weight, momentum and teacher read and written; and where both networks keep it in half
# precision, as they do all but the last layer's and the norms', what is written there.
UPDATE_BYTES, HALF_BYTES = 32, 4

Figures = dict[str, float]  # by the names of UNITS
Work = Callable[[], object]


def loss_arms(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> dict[str, Work]:
    """The networks do not take part: they are those of a small backbone."""
    what = "loss fp16" if dtype == torch.float16 else "loss fp32"
    small = Recipe(backbone="resnet18", batch_size=recipe.batch_size, head=recipe.head, crops=recipe.crops)
    rows, width = VIEWS * recipe.batch_size, recipe.head.out_dim
    student = (2 * torch.rand(rows, width, device=device) - 1).to(dtype)
    teacher = (2 * torch.rand(2 * recipe.batch_size, width, device=device) - 1).to(dtype)
    pair = build_student_teacher(small.backbone, small.head)
    arms: dict[str, Work] = {f"{what}: copy": copy((3 * student.nbytes + 2 * teacher.nbytes) // 2, device)}
    for name, kind in (("published", Published), ("einsum", Stock)):
        arms[f"{what}: {name}"] = partial(baseline_loss, kind(small, pair, steady(small), device), student, teacher)
    for name, kernels in ours(device).items():
        arms[f"{what}: {name}"] = partial(our_loss, train_step(small, device, kernels), student.clone(), teacher)
    return arms


def baseline_loss(step: Published | Stock, student: Tensor, teacher: Tensor) -> None:
    logits = student.detach().requires_grad_()
    wide = isinstance(step, Stock)
    step.loss(logits.float() if wide else logits, teacher.float() if wide else teacher, VIEWS).backward()
    if isinstance(step, Stock):  # the published loss moves it itself
        step.center.lerp_(teacher.float().mean(dim=0, keepdim=True), 1 - step.recipe.loss.center_momentum)


def our_loss(step: TrainStep, student: Tensor, teacher: Tensor) -> None:
    # The kernel's gradient takes the logits' place, and is the next iteration's logits: no time depends on values.
    logits = student.detach().requires_grad_()
    temp = step.settings(steady(Recipe())).teacher_temp
    found = step.objective(logits, teacher, step.center, step.loss.student_temp, temp, VIEWS)
    center = CenterUpdate(step.center, found.teacher_mean, step.loss.center_momentum)
    found.loss.backward()
    center.finish()


def update_arms(recipe: Recipe, device: torch.device) -> dict[str, Work]:
    torch.manual_seed(0)
    pair = build_student_teacher(recipe.backbone, recipe.head)
    count = sum(parameter.numel() for parameter in pair[0].parameters())
    halves = [layer.weight.numel() for layer in pair[0].modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    arms: dict[str, Work] = {"update: copy": copy((UPDATE_BYTES * count + HALF_BYTES * sum(halves)) // 2, device)}
    for name, kind in (("published", Published), ("stock", Stock)):
        step = kind(recipe, pair, steady(recipe), device)
        give_gradients(step.student)
        arms[f"update: {name}"] = partial(baseline_update, step)
    for name, kernels in ours(device).items():
        mine = train_step(recipe, device, kernels)
        give_gradients(mine.bare_student)
        arms[f"update: {name}"] = partial(our_update, mine)
    return arms


def baseline_update(step: Published | Stock) -> None:
    if step.scaler.is_enabled():
        step.scaler.scale(torch.ones((), device=step.device))  # makes its state, as a loss would
    step.update()


def our_update(step: TrainStep) -> None:
    step.update(step.settings(steady(Recipe())), step.loss_scale)


def give_gradients(network: nn.Module) -> None:
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)


def ours(device: torch.device) -> dict[str, bool]:
    """Our arms, and whether they use kernels."""
    if device.type == "cuda":
        return {"torch": False, "triton": True}
    print("triton: not measured, there is no GPU")
    return {"torch": False}


def train_step(recipe: Recipe, device: torch.device, kernels: bool) -> TrainStep:
    return build_step(recipe, Ranks(0, 1, device), kernels=kernels)


def copy(size: int, device: torch.device) -> Work:
    """Of `size` bytes, which are read and written."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    return partial(torch.zeros_like(source).copy_, source)


def one_round(work: Work, iterations: int, device: torch.device) -> Figures:
    work()
    start = finished(device)
    for _ in range(iterations):
        work()
    figures = {"time": 1e6 * (finished(device) - start) / iterations}
    return figures | ({"device": 1e6 * device_time(work, iterations, device)} if device.type == "cuda" else {})


def add_shares(rounds: dict[str, list[Figures]]) -> None:
    """Each round against the copy of the same round and kind."""
    for name, found in rounds.items():
        copies = rounds.get(f"{name.partition(':')[0]}: copy")
        for figure, plain in zip(found, copies or [], strict=False):
            kind = "device" if "device" in figure else "time"
            figure["copy share"] = 100 * plain[kind] / figure[kind]


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128 if gpu else 8)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--prototypes", type=int, default=65536, help="K")
    parser.add_argument("--iterations", type=int, default=20 if gpu else 2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="ARM", help="the arms to run; all by default")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = choose_device()
    settings: dict[str, Any] = {"backbone": options.backbone, "batch_size": options.batch}
    recipe = Recipe(crops=CropRecipe(locals=VIEWS - 2), head=HeadRecipe(out_dim=options.prototypes), **settings)
    works = attempt("update", partial(update_arms, recipe, device)) or {}
    for dtype in (torch.float32, torch.float16) if gpu else (torch.float32,):
        works |= attempt(f"loss, {dtype}", partial(loss_arms, recipe, device, dtype)) or {}
    chosen = {name: work for name, work in works.items() if options.only is None or name in options.only}
    rounds = interleaved(
        {name: partial(one_round, work, options.iterations, device) for name, work in chosen.items()},
        options.rounds,
        partial(keep_records, "kernels", UNITS, options.json),
    )
    add_shares(rounds)
    print(f"batches of {options.batch}, K = {recipe.head.out_dim}, {options.backbone} on {device}")
    report(records("kernels", UNITS, rounds), options.json)


if __name__ == "__main__":
    main()
