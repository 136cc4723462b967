"""The training step alone, on random crops in the device's memory: ours beside the published one and stock PyTorch.

    python -m bench.step [--batch 8] [--precision P] [--backbone resnet50] [--rounds 5] [--steps 1] [--only ARM ...]
                         [--profile] [--json bench/results/X.jsonl] [--kernels bench/results/X-kernels.jsonl]

The arms, which take the same recipe (ResNet-50, K = 65536, 2×224 + 6×96 unless asked otherwise) and the same
pictures: `bench/baselines.py`'s "published", in float16 on a GPU and float32 on a CPU whatever --precision says, and
"stock", in bfloat16 unless it says fp32; then ours, of which "fused" has batch norm and what follows it in our own
kernels, and "aside" has the teacher on a stream of its own. What cannot run here, or fails, is left out with a line
that says why. Each arm runs a round when it is built; that one counts only where nothing else was measured. Figures of
a round, over --steps steps:

- images: a second;
- step: ms; on a GPU between two events;
- host: ms until the call of one step returns, the GPU being idle before it (GPU only);
- compute: TFLOP/s of convolutions and matrix products, counted from the layers (`dino_fast/model/flops.py`);
- memory: MB of the GPU's memory that the arm holds at its peak, its pictures included (GPU only);
- ... roofline: percent of the bounds of `bench/roofline.py`, whose probes run in the same round (ResNet-50 only);
- traffic: GB/s that a step with all pointwise work fused would move at this speed; eager ones move a third more;
- GEMM share, copy share: compute and traffic, in percent of what the probes reach in the same round.

And from one more step under torch's profiler: launches, the kernels of a step (GPU only); with --profile, ms in each
class of kernels, on a CPU of operators without those that they call. Classes go by names: a compiled kernel that does
batch norm and more is batch norm, a loop over parameters is pointwise where it multiplies and adds. With --kernels each
kernel of each arm is a line of JSON: arm, kernel (the start of its name), class, launches a step, ms a step. The most
expensive ones are printed.
"""

import argparse
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench import roofline
from bench.baselines import Published, Stock
from bench.timing import attempt, interleaved, json_lines, keep_records, records, report
from dino_fast.config import Recipe
from dino_fast.distributed import Ranks
from dino_fast.model import kernels as model_kernels
from dino_fast.model.backbones import BACKBONES
from dino_fast.model.flops import flops_an_image
from dino_fast.model.head import HeadRecipe
from dino_fast.run.schedules import Hyper, scaled_lr
from dino_fast.step import kernels as step_kernels
from dino_fast.step.compiled import compile_backbones, why_not
from dino_fast.step.recorded import GraphedStep
from dino_fast.step.train_step import Precision, build_student_teacher
from dino_fast.train import DTYPES, build_step, set_up_math
from pipelines.crops import CropRecipe

WARM_UP = 6  # steps on a GPU before anything is timed: kernels are chosen and compiled, graphs recorded
GRAPHS = 64  # compiled graphs of one function: arms have three each, and torch runs what exceeds its limit of 8 eagerly
NAME = 200  # characters of a kernel's name that are kept
SHOWN = 10  # kernels of an arm that are printed
PROBES = "probes"
CLASSES = ("conv", "batch norm", "pointwise", "matmul", "loss", "update", "copy", "other")
UNITS = (
    {"images": "img/s", "step": "ms", "host": "ms", "compute": "TFLOP/s", "memory": "MB", "launches": "kernels"}
    | {"traffic": "GB/s", "GEMM share": "%", "copy share": "%"}
    | {f"{name} roofline": "%" for name in roofline.TRAFFIC}
    | {f"in {kind}": "ms" for kind in CLASSES}
    | {"bandwidth": "GB/s"}
)

Figures = dict[str, float]  # by the names of UNITS
Step = Callable[[Tensor, Tensor], object]  # on globals [2·B, 3, G, G] and locals [n·B, 3, L, L]
Views = tuple[Tensor, Tensor]


# The arms


@dataclass(frozen=True)
class Kind:
    """How an arm is made."""

    build: Callable[[Recipe, torch.device], Step]
    views: Callable[[Recipe, torch.device], Views]
    lacks: Callable[[torch.device], str | None] = lambda device: None
    """why it cannot run on a device here; None where it can"""


@dataclass
class Arm:
    """A step under measurement, with its pictures."""

    step: Step
    views: Views
    held: int = 0  # bytes of the GPU's memory between its rounds
    peak: int = 0  # and at most while it became warm: a recorded step's replays allocate nothing

    def run(self) -> None:
        self.step(*self.views)


def published(recipe: Recipe, device: torch.device) -> Step:
    torch.manual_seed(recipe.seed)
    return Published(recipe, build_student_teacher(recipe.backbone, recipe.head), steady(recipe), device)


def stock(recipe: Recipe, device: torch.device, compiled: bool = False) -> Step:
    torch.manual_seed(recipe.seed)
    return Stock(recipe, build_student_teacher(recipe.backbone, recipe.head), steady(recipe), device, compiled)


def ours(
    recipe: Recipe,
    device: torch.device,
    compiled: bool = False,
    fused: bool = False,
    graphed: bool = False,
    aside: bool = False,
) -> Step:
    """As train.py builds it; fused: with batch norm in our own kernels, aside: with the teacher on a stream of its
    own."""
    step = build_step(recipe, Ranks(0, 1, device), fused_norms=fused, teacher_aside=aside)
    if compiled:
        compile_backbones(step)
    return partial(GraphedStep(step) if graphed else step, hyper=steady(recipe))


def steady(recipe: Recipe) -> Hyper:
    """The settings of a step after the warm-up and the first epoch."""
    optim = recipe.optim
    lr = scaled_lr(optim, recipe.batch_size)
    return Hyper(lr, optim.weight_decay, optim.ema_momentum, recipe.loss.teacher_temp, freeze_last_layer=False)


def plain_views(recipe: Recipe, device: torch.device) -> Views:
    """Float32, NCHW."""
    return random_views(recipe, device, torch.float32, torch.contiguous_format)


def loader_views(recipe: Recipe, device: torch.device) -> Views:
    """As our loader makes them: in the run's precision, channels-last."""
    return random_views(recipe, device, DTYPES[recipe.precision], torch.channels_last)


def stock_views(recipe: Recipe, device: torch.device) -> Views:
    """As a loader would make them for it: in the precision of its autocast, channels-last."""
    half = torch.float32 if recipe.precision == "fp32" else torch.bfloat16
    return random_views(recipe, device, half, torch.channels_last)


def random_views(recipe: Recipe, device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> Views:
    """Globals and locals of noise, the same in every arm: no arm's time depends on what the pictures show."""
    made, crops, batch = torch.Generator().manual_seed(recipe.seed), recipe.crops, recipe.batch_size
    globals_ = torch.randn(2 * batch, 3, crops.global_size, crops.global_size, generator=made)
    locals_ = torch.randn(crops.locals * batch, 3, crops.local_size, crops.local_size, generator=made)
    return globals_.to(device, dtype, memory_format=layout), locals_.to(device, dtype, memory_format=layout)


compiler = cache(why_not)


def streams(device: torch.device) -> str | None:
    return compiler(device) if device.type == "cuda" else "streams need a GPU"


def graphs(device: torch.device) -> str | None:
    return compiler(device) if device.type == "cuda" else "CUDA graphs need a GPU"


def kernels_run(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "our kernels need a GPU"


KINDS = {
    "published": Kind(published, plain_views),
    "stock": Kind(stock, stock_views),
    "stock-compiled": Kind(partial(stock, compiled=True), stock_views, compiler),
    "ours": Kind(ours, loader_views),
    "ours-compiled": Kind(partial(ours, compiled=True), loader_views, compiler),
    "ours-fused": Kind(partial(ours, fused=True), loader_views, kernels_run),
    "ours-fused-graphed": Kind(partial(ours, fused=True, graphed=True), loader_views, kernels_run),
    "ours-aside": Kind(partial(ours, compiled=True, aside=True), loader_views, streams),
    "ours-graphed": Kind(partial(ours, compiled=True, graphed=True), loader_views, graphs),
    "ours-graphed-aside": Kind(partial(ours, compiled=True, graphed=True, aside=True), loader_views, graphs),
}


def build_arms(
    names: list[str], recipe: Recipe, device: torch.device, steps: int
) -> Iterator[tuple[str, Arm, Figures]]:
    """Name, arm and figures of a first round of those that can run here, warm. Says why others cannot."""
    for name in names:
        if lacking := KINDS[name].lacks(device):
            print(f"left out, {name}: {lacking}")
            continue
        start = time.perf_counter()
        if (built := attempt(name, partial(build_and_run, KINDS[name], recipe, device, steps))) is not None:
            print(f"{name}: ready after {time.perf_counter() - start:.1f} s", flush=True)
            yield name, *built


def build_and_run(kind: Kind, recipe: Recipe, device: torch.device, steps: int) -> tuple[Arm, Figures]:
    """An arm, and the figures of its first round."""
    arm = build_arm(kind, recipe, device)
    return arm, one_round(arm, recipe, device, steps)


def build_arm(kind: Kind, recipe: Recipe, device: torch.device) -> Arm:
    before = allocated(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    arm = Arm(kind.build(recipe, device), kind.views(recipe, device))
    if device.type == "cuda":
        for _ in range(WARM_UP):
            arm.run()
        torch.cuda.synchronize()
        arm.peak = torch.cuda.max_memory_allocated() - before
    arm.held = allocated(device) - before
    return arm


def allocated(device: torch.device) -> int:
    """Bytes of the GPU's memory."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


# A round


def one_round(arm: Arm, recipe: Recipe, device: torch.device, steps: int) -> Figures:
    figures = gpu_round(arm, steps) if device.type == "cuda" else cpu_round(arm, steps)
    images = 1e3 * recipe.batch_size / figures["step"]
    return figures | {"images": images, "compute": images * flops_an_image(recipe) / 1e12}


def cpu_round(arm: Arm, steps: int) -> Figures:
    start = time.perf_counter()
    for _ in range(steps):
        arm.run()
    return {"step": 1e3 * (time.perf_counter() - start) / steps}


def gpu_round(arm: Arm, steps: int) -> Figures:
    """Memory is counted without what the other arms hold."""
    others = torch.cuda.memory_allocated() - arm.held
    torch.cuda.reset_peak_memory_stats()
    host = host_time(arm)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(steps):
        arm.run()
    end.record()
    end.synchronize()
    arm.held = torch.cuda.memory_allocated() - others
    memory = max(arm.peak, torch.cuda.max_memory_allocated() - others)
    return {"step": start.elapsed_time(end) / steps, "host": host, "memory": memory / 1e6}


def host_time(arm: Arm) -> float:
    """ms until the call of a step returns; the GPU is idle before and after."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    arm.run()
    host = 1e3 * (time.perf_counter() - start)
    torch.cuda.synchronize()
    return host


def add_shares(rounds: dict[str, list[Figures]], recipe: Recipe) -> None:
    """Each arm's round against the probes of the same round, and the rooflines by these. Nothing without probes."""
    if PROBES not in rounds:
        return
    fused = roofline.moved(recipe)["pointwise-fused"]
    for number, probed in enumerate(rounds[PROBES]):
        bounds = roofline.lines(probed, recipe)
        for figures in (found[number] for name, found in rounds.items() if name != PROBES):
            figures |= {f"{name} roofline": 100 * figures["images"] / bound for name, bound in bounds.items()}
            figures["GEMM share"] = 100 * figures["compute"] / probed["compute"]
            figures["traffic"] = figures["images"] * fused / 1e9
            figures["copy share"] = 100 * figures["traffic"] / probed["bandwidth"]


# Kernels and their classes

# The first match wins. The names are those of cuDNN, cuBLAS, CUTLASS, ATen and Inductor on a GPU, of ATen's operators
# on a CPU. Inductor's say what a kernel fuses: triton_red_fused__native_batch_norm_legit_functional_3.
RULES = [
    ("batch norm", r"batch_?norm|bn_[fb]w|bn_stats"),
    ("pointwise", r"triton_(poi|red|per|for)"),
    ("update", r"multi_tensor|foreach|fused_sgd|optimizer|NormTwoOps|vector_norm"),
    ("loss", r"softmax"),
    ("copy", r"mem(cpy|set)|copy|nchwto|nhwcto|padding|transpose|cat\b|catarray|fill|zero_"),
    ("conv", r"conv(?!ert)|fprop|dgrad|wgrad|winograd|cudnn"),
    ("matmul", r"gemm|gemv|nvjet|cutlass|cublas|splitk|::(add)?mm\b|::bmm|::linear"),
    ("pointwise", r"elementwise|relu|gelu|threshold|max_?pool|::(add|sub|mul|div|exp|neg|clamp_min)_?\b"),
]


def kernel_class(name: str) -> str:
    """One of CLASSES."""
    if name in our_kernels():
        return our_kernels()[name]
    return next((kind for kind, rule in RULES if re.search(rule, name, re.IGNORECASE)), "other")


@cache
def our_kernels() -> dict[str, str]:
    """The classes of our own kernels by the names of their functions, which launches go by."""
    files = {"dino_loss": "loss", "update": "update", "batch_norm": "batch norm"}
    return {
        name: files.get(file.stem, "other")
        for folder in kernel_folders()
        for file in sorted(folder.glob("*.py"))
        for name in launched(file.read_text())
    }


def kernel_folders() -> list[Path]:
    """Where our kernels are."""
    return [Path(str(room.__file__)).parent for room in (model_kernels, step_kernels)]


def launched(source: str) -> list[str]:
    """The kernels that a module launches, by name: those with a grid. Others are called by them."""
    names = re.findall(r"^@triton\.jit.*\ndef (\w+)", source, re.MULTILINE)
    return [name for name in names if re.search(rf"\b{name}\[", source)]


def events(arm: Arm, device: torch.device) -> list[tuple[str, float]]:
    """(name, ms) of all that one step runs: on a GPU kernels and copies, else operators without those they call."""
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as found:
        arm.run()
        if gpu:
            torch.cuda.synchronize()
    if not gpu:
        return [(event.name, event.self_cpu_time_total / 1e3) for event in found.events()]
    on_gpu = [event for event in found.events() if event.device_type.name == "CUDA"]
    # Annotations span kernels, and would count them twice.
    return [(event.name, event.time_range.elapsed_us() / 1e3) for event in on_gpu if not event.is_user_annotation]


def profiled(found: list[tuple[str, float]], device: torch.device, by_class: bool) -> Figures:
    """The figures that take the profiler, from (name, ms)."""
    launches = float(sum(not re.match("mem(cpy|set)", name, re.IGNORECASE) for name, _ in found))
    figures = {"launches": launches} if device.type == "cuda" else {}
    return figures | (class_times(found) if by_class else {})


def class_times(found: list[tuple[str, float]]) -> Figures:
    """ms in each class, from (name, ms)."""
    times = {f"in {kind}": 0.0 for kind in CLASSES}
    for name, ms in found:
        times[f"in {kernel_class(name)}"] += ms
    return times


def kernel_rows(arm: str, found: list[tuple[str, float]]) -> list[dict[str, Any]]:
    """A row of each kernel of a step from (name, ms), the most expensive first. ms: of all its launches together."""
    times: defaultdict[str, list[float]] = defaultdict(list)
    for name, ms in found:
        times[name].append(ms)
    rows = [
        {"arm": arm, "kernel": name[:NAME], "class": kernel_class(name), "launches": len(each), "ms": sum(each)}
        for name, each in times.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def show_kernels(arm: str, rows: list[dict[str, Any]]) -> None:
    """Print the first SHOWN rows, and what the others are together."""
    shown, rest = rows[:SHOWN], rows[SHOWN:]
    print(f"{arm}: {len(rows)} kernels, {sum(row['ms'] for row in rows):.2f} ms a step")
    for row in shown:
        print(f"{row['ms']:9.3f} ms {row['launches']:5d} ×  {row['class']:10s} {row['kernel'][:100]}")
    if rest:
        print(f"{sum(row['ms'] for row in rest):9.3f} ms {sum(row['launches'] for row in rest):5d} ×  all others")


# The run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that make the recipe, and how often it is run."""
    gpu = torch.cuda.is_available()
    parser.add_argument("--batch", type=int, default=128 if gpu else 8, help="images a step")
    parser.add_argument("--precision", choices=DTYPES, default="fp16" if gpu else "bf16", help="of ours and the bounds")
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet50")
    parser.add_argument("--global_size", type=int, default=224, help="pixels")
    parser.add_argument("--local_size", type=int, default=96, help="pixels")
    parser.add_argument("--locals", type=int, default=6, help="views, at least 1")
    parser.add_argument("--prototypes", type=int, default=65536, help="K")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20 if gpu else 1, help="of a round")
    parser.add_argument("--json", type=Path)


def recipe_of(options: argparse.Namespace) -> Recipe:
    if options.locals < 1:
        raise SystemExit("--locals: expected at least 1")
    return Recipe(
        batch_size=options.batch,
        precision=options.precision,
        backbone=options.backbone,
        crops=CropRecipe(
            options.global_size, (0.14, 1.0), options.local_size, local_scale=(0.05, 0.14), locals=options.locals
        ),
        head=HeadRecipe(out_dim=options.prototypes),
    )


def choose_device(precision: Precision = "fp16") -> torch.device:
    """The GPU where there is one, set as train.py sets it for a precision."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    set_up_math(precision, device)
    return device


def described(recipe: Recipe, device: torch.device) -> str:
    """The recipe in one line."""
    crops, where = recipe.crops, "the GPU" if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return (
        f"{recipe.backbone}, 2×{crops.global_size} + {crops.locals}×{crops.local_size}, K = {recipe.head.out_dim}, "
        f"batches of {recipe.batch_size}, {recipe.precision} on {where}: "
        f"{flops_an_image(recipe) / 1e9:.1f} GFLOP an image"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--only", nargs="+", metavar="ARM", choices=KINDS, default=list(KINDS))
    parser.add_argument("--profile", action="store_true", help="ms in each class of kernels, from one more step")
    parser.add_argument("--kernels", type=Path, help="append every kernel of each arm to this file, as JSON lines")
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = GRAPHS
    recipe, device = recipe_of(options), choose_device(options.precision)
    arms: dict[str, Arm] = {}
    rounds = measure(options, recipe, device, arms)
    if not rounds:
        raise SystemExit("no arm was measured")
    add_shares(rounds, recipe)
    if PROBES in rounds:
        rounds |= roofline.as_arms(rounds[PROBES], recipe)
    print(described(recipe, device))
    report(records("step", UNITS, rounds), options.json)
    if options.profile or options.kernels or device.type == "cuda":
        for name, arm in arms.items():
            if name in rounds:
                attempt(name, partial(profile_arm, name, arm, device, options))


def measure(
    options: argparse.Namespace, recipe: Recipe, device: torch.device, arms: dict[str, Arm]
) -> dict[str, list[Figures]]:
    """Build the arms into `arms`, and return the figures of all rounds. After a KeyboardInterrupt before the first
    complete round these are the figures of the arms' first rounds."""
    keep = partial(keep_records, "step", UNITS, options.json)
    first: dict[str, list[Figures]] = {}
    try:
        for name, arm, figures in build_arms(options.only, recipe, device, options.steps):
            arms[name], first[name] = arm, [figures]
            keep(first)
        timed = {name: partial(one_round, arm, recipe, device, options.steps) for name, arm in arms.items()}
        if recipe.backbone == roofline.BACKBONE:
            timed[PROBES] = partial(roofline.probes, device, DTYPES[recipe.precision])
        else:
            print(f"left out, rooflines: the traffic of {recipe.backbone} is not known")
        return interleaved(timed, options.rounds, keep, uncounted=0) if arms else {}
    except KeyboardInterrupt:
        print(f"interrupted: of {', '.join(first) or 'no arm'} the first round alone")
        return first


def profile_arm(name: str, arm: Arm, device: torch.device, options: argparse.Namespace) -> None:
    """Run one more step under the profiler, report its figures, and keep its kernels."""
    found = events(arm, device)
    report(records("step", UNITS, {name: [profiled(found, device, options.profile)]}), options.json)
    rows = kernel_rows(name, found)
    show_kernels(name, rows)
    if options.kernels is not None:
        with open(options.kernels, "a", encoding="utf-8") as out:
            out.write(json_lines(rows))


if __name__ == "__main__":
    main()
