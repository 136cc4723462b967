"""Build the arms of the step's benchmark, and measure a round of one."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.baselines import Published, Stock
from bench.step_recipe import make_steady_hyper
from bench.timing import Figures, attempt, print_left_out
from dino_fast.config import Recipe
from dino_fast.distributed import Ranks
from dino_fast.model.flops import flops_an_image
from dino_fast.model.student_teacher import build_student_teacher
from dino_fast.run.build import build_train_step
from dino_fast.run.drop_path import draw_scales
from dino_fast.step.compiled import compile_backbones, find_compile_problem
from dino_fast.step.precision import DTYPES
from dino_fast.step.recorded import RecordedStep

WARM_UP = 6  # steps on a GPU before anything is timed: kernels are chosen and compiled, graphs recorded

Step = Callable[[Tensor, Tensor], object]  # on globals [2·B, 3, G, G] and locals [n·B, 3, L, L]
Views = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ArmKind:
    """How an arm is made."""

    build: Callable[[Recipe, torch.device], Step]
    """builds the step"""
    views: Callable[[Recipe, torch.device], Views]
    """makes its views"""
    find_problem: Callable[[torch.device], str | None] = lambda device: None
    """returns why it cannot run on a device here, or None"""


@dataclass
class Arm:
    """A step under measurement, with its views."""

    step: Step
    """the step"""
    views: Views
    """what it is run on"""
    held: int = 0
    """bytes of the GPU's memory that it holds between its rounds"""
    peak: int = 0
    """most bytes of the GPU's memory during the warm-up; a recorded step allocates nothing later"""

    def run(self) -> None:
        """Run one step."""
        self.step(*self.views)


def build_published(recipe: Recipe, device: torch.device) -> Step:
    """Build the published step."""
    torch.manual_seed(recipe.seed)
    pair = build_student_teacher(recipe.backbone, recipe.head)
    return Published(recipe, pair, make_steady_hyper(recipe), device)


def build_stock(recipe: Recipe, device: torch.device, compiled: bool = False) -> Step:
    """Build the step of well-tuned stock PyTorch."""
    torch.manual_seed(recipe.seed)
    pair = build_student_teacher(recipe.backbone, recipe.head)
    return Stock(recipe, pair, make_steady_hyper(recipe), device, compiled)


def build_ours(
    recipe: Recipe,
    device: torch.device,
    compiled: bool = False,
    fused: bool = False,
    graphed: bool = False,
    aside: bool = False,
) -> Step:
    """Build our step as training builds it.

    `fused` does batch norm in our own kernels, `graphed` records CUDA graphs, `aside` runs the teacher on a stream of
    its own. The drop path of a ViT is drawn for each step, as in the training loop.
    """
    step = build_train_step(recipe, Ranks(0, 1, device), fused_norms=fused, teacher_aside=aside)
    if compiled:
        compile_backbones(step)
    run = RecordedStep(step) if graphed else step
    hyper, ids, numbers = make_steady_hyper(recipe), np.arange(recipe.batch_size), count()

    def draw_and_run(globals_: Tensor, locals_: Tensor) -> object:
        return run(globals_, locals_, hyper, draw_scales(recipe, next(numbers), ids, device))

    return draw_and_run


def make_plain_views(recipe: Recipe, device: torch.device) -> Views:
    """Return views in float32, NCHW."""
    return _make_views(recipe, device, torch.float32, torch.contiguous_format)


def make_loader_views(recipe: Recipe, device: torch.device) -> Views:
    """Return views as our loader makes them: in the run's precision, channels-last."""
    return _make_views(recipe, device, DTYPES[recipe.precision], torch.channels_last)


def make_stock_views(recipe: Recipe, device: torch.device) -> Views:
    """Return views as a loader would make them for the stock step: in the type of its autocast, channels-last."""
    dtype = torch.float32 if recipe.precision == "fp32" else torch.bfloat16
    return _make_views(recipe, device, dtype, torch.channels_last)


def _make_views(recipe: Recipe, device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> Views:
    """Return random noise, the same in every arm. No arm's time depends on what the images show."""
    generator = torch.Generator().manual_seed(recipe.seed)
    crops, batch = recipe.crops, recipe.batch_size
    globals_ = torch.randn(2 * batch, 3, crops.global_size, crops.global_size, generator=generator)
    locals_ = torch.randn(crops.locals * batch, 3, crops.local_size, crops.local_size, generator=generator)
    return globals_.to(device, dtype, memory_format=layout), locals_.to(device, dtype, memory_format=layout)


find_compiler_problem = cache(find_compile_problem)


def find_stream_problem(device: torch.device) -> str | None:
    """Return why an arm with two streams cannot run, or None."""
    return find_compiler_problem(device) if device.type == "cuda" else "streams need a GPU"


def find_graph_problem(device: torch.device) -> str | None:
    """Return why an arm with a compiler and CUDA graphs cannot run, or None."""
    return find_compiler_problem(device) if device.type == "cuda" else "CUDA graphs need a GPU"


def find_kernel_problem(device: torch.device) -> str | None:
    """Return why an arm with our own kernels cannot run, or None."""
    return None if device.type == "cuda" else "our kernels need a GPU"


def _ours(find_problem: Callable[[torch.device], str | None], **options: Any) -> ArmKind:
    """Return one of our arms, with options of `build_ours`."""
    return ArmKind(partial(build_ours, **options), make_loader_views, find_problem)


ARM_KINDS = {
    "published": ArmKind(build_published, make_plain_views),
    "stock": ArmKind(build_stock, make_stock_views),
    "stock-compiled": ArmKind(partial(build_stock, compiled=True), make_stock_views, find_compiler_problem),
    "ours": ArmKind(build_ours, make_loader_views),
    "ours-compiled": _ours(find_compiler_problem, compiled=True),
    "ours-fused": _ours(find_kernel_problem, fused=True),
    "ours-fused-graphed": _ours(find_kernel_problem, fused=True, graphed=True),
    "ours-aside": _ours(find_stream_problem, compiled=True, aside=True),
    "ours-graphed": _ours(find_graph_problem, compiled=True, graphed=True),
    "ours-graphed-aside": _ours(find_graph_problem, compiled=True, graphed=True, aside=True),
}


def build_arms(
    kinds: dict[str, ArmKind], recipe: Recipe, device: torch.device, steps: int
) -> Iterator[tuple[str, Arm, Figures]]:
    """Build the arms that can run here, warm each up, and yield it with its name and the figures of a first round.

    Prints why others cannot run.
    """
    for name, kind in kinds.items():
        if problem := kind.find_problem(device):
            print_left_out(name, problem)
            continue
        start = time.perf_counter()
        if (built := attempt(name, partial(_build_and_measure, kind, recipe, device, steps))) is not None:
            print(f"{name}: ready after {time.perf_counter() - start:.1f} s", flush=True)
            yield name, *built


def _build_and_measure(kind: ArmKind, recipe: Recipe, device: torch.device, steps: int) -> tuple[Arm, Figures]:
    arm = build_arm(kind, recipe, device)
    return arm, measure_round(arm, recipe, device, steps)


def build_arm(kind: ArmKind, recipe: Recipe, device: torch.device) -> Arm:
    """Build an arm. On a GPU it is warmed up, too."""
    before = count_allocated(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    arm = Arm(kind.build(recipe, device), kind.views(recipe, device))
    if device.type == "cuda":
        for _ in range(WARM_UP):
            arm.run()
        torch.cuda.synchronize()
        arm.peak = torch.cuda.max_memory_allocated() - before
    arm.held = count_allocated(device) - before
    return arm


def count_allocated(device: torch.device) -> int:
    """Return the bytes that are allocated on the GPU, or 0 on a CPU."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def measure_round(arm: Arm, recipe: Recipe, device: torch.device, steps: int) -> Figures:
    """Return the figures of one round of `steps` steps."""
    figures = _measure_on_gpu(arm, steps) if device.type == "cuda" else _measure_on_cpu(arm, steps)
    images = 1e3 * recipe.batch_size / figures["step"]
    return figures | {"images": images, "compute": images * flops_an_image(recipe) / 1e12}


def _measure_on_cpu(arm: Arm, steps: int) -> Figures:
    start = time.perf_counter()
    for _ in range(steps):
        arm.run()
    return {"step": 1e3 * (time.perf_counter() - start) / steps}


def _measure_on_gpu(arm: Arm, steps: int) -> Figures:
    """Return step, host and memory. The memory of the other arms is not counted."""
    others = torch.cuda.memory_allocated() - arm.held
    torch.cuda.reset_peak_memory_stats()
    host = _measure_host_time(arm)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(steps):
        arm.run()
    end.record()
    end.synchronize()
    arm.held = torch.cuda.memory_allocated() - others
    memory = max(arm.peak, torch.cuda.max_memory_allocated() - others)
    return {"step": start.elapsed_time(end) / steps, "host": host, "memory": memory / 1e6}


def _measure_host_time(arm: Arm) -> float:
    """Return the ms until the call of a step returns. The GPU is idle before and after it."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    arm.run()
    host = 1e3 * (time.perf_counter() - start)
    torch.cuda.synchronize()
    return host
