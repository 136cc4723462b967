"""Profile one step, and sort its kernels into classes by their names."""

import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.step_arms import Arm
from bench.timing import Figures
from dino_fast.model import kernels as model_kernels
from dino_fast.step import kernels as step_kernels

CLASSES = ("conv", "batch norm", "pointwise", "matmul", "loss", "update", "copy", "other")
MAX_NAME = 200  # characters of a kernel's name that are kept
SHOWN = 10  # kernels of an arm that are printed

# The first match wins. The names are those of cuDNN, cuBLAS, CUTLASS, ATen and Inductor on a GPU, and those of ATen's
# operators on a CPU. Inductor's names say what a kernel fuses: triton_red_fused__native_batch_norm_legit_functional_3.
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

Timed = tuple[str, float]  # the name of a kernel or an operator, and the milliseconds of one launch


def classify_kernel(name: str) -> str:
    """Return the class of a kernel, one of CLASSES."""
    ours = find_our_kernels()
    if name in ours:
        return ours[name]
    return next((kind for kind, rule in RULES if re.search(rule, name, re.IGNORECASE)), "other")


@cache
def find_our_kernels() -> dict[str, str]:
    """Return the classes of our own kernels by the names of their functions. A launch has the name of the function."""
    files = {"dino_loss": "loss", "update": "update", "batch_norm": "batch norm"}
    return {
        name: files.get(file.stem, "other")
        for folder in find_kernel_folders()
        for file in sorted(folder.glob("*.py"))
        for name in find_launched(file.read_text())
    }


def find_kernel_folders() -> list[Path]:
    """Return the folders of our kernels."""
    return [Path(str(package.__file__)).parent for package in (model_kernels, step_kernels)]


def find_launched(source: str) -> list[str]:
    """Return the names of the kernels that a module launches: those with a grid. They call the other ones."""
    names = re.findall(r"^@triton\.jit.*\ndef (\w+)", source, re.MULTILINE)
    return [name for name in names if re.search(rf"\b{name}\[", source)]


def profile_step(arm: Arm, device: torch.device) -> list[Timed]:
    """Run one step, and return the name and the milliseconds of all that it runs.

    On a GPU these are kernels and copies. On a CPU they are operators, each without the operators that it calls.
    """
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        arm.run()
        if gpu:
            torch.cuda.synchronize()
    if not gpu:
        return [(event.name, event.self_cpu_time_total / 1e3) for event in profiler.events()]
    return list_launches(profiler)


def list_launches(profiler: profile) -> list[Timed]:
    """Return the name and the milliseconds of each kernel and copy that ran on the GPU under a profiler."""
    on_gpu = [event for event in profiler.events() if event.device_type.name == "CUDA"]
    # Annotations span kernels, and would count them twice.
    return [(event.name, event.time_range.elapsed_us() / 1e3) for event in on_gpu if not event.is_user_annotation]


def make_profile_figures(timed: list[Timed], device: torch.device, by_class: bool) -> Figures:
    """Return the figures that need the profiler: launches on a GPU, and with `by_class` the time of each class."""
    launches = float(sum(not re.match("mem(cpy|set)", name, re.IGNORECASE) for name, _ in timed))
    figures = {"launches": launches} if device.type == "cuda" else {}
    return figures | (sum_by_class(timed) if by_class else {})


def sum_by_class(timed: list[Timed]) -> Figures:
    """Return the milliseconds in each class."""
    times = {f"in {kind}": 0.0 for kind in CLASSES}
    for name, ms in timed:
        times[f"in {classify_kernel(name)}"] += ms
    return times


def make_kernel_rows(arm: str, timed: list[Timed]) -> list[dict[str, Any]]:
    """Return a row for each kernel of a step, the most expensive first. `ms` sums up all of its launches."""
    times: defaultdict[str, list[float]] = defaultdict(list)
    for name, ms in timed:
        times[name].append(ms)
    rows = [
        {"arm": arm, "kernel": name[:MAX_NAME], "class": classify_kernel(name), "launches": len(each), "ms": sum(each)}
        for name, each in times.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def print_kernels(arm: str, rows: list[dict[str, Any]]) -> None:
    """Print the first SHOWN rows, and the sum of the others."""
    shown, rest = rows[:SHOWN], rows[SHOWN:]
    print(f"{arm}: {len(rows)} kernels, {sum(row['ms'] for row in rows):.2f} ms a step")
    for row in shown:
        print(f"{row['ms']:9.3f} ms {row['launches']:5d} ×  {row['class']:10s} {row['kernel'][:100]}")
    if rest:
        print(f"{sum(row['ms'] for row in rest):9.3f} ms {sum(row['launches'] for row in rest):5d} ×  all others")
