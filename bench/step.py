"""Measure the training step alone: ours beside the published step and stock PyTorch.

    python -m bench.step
    python -m bench.step --only published stock ours --rounds 3 --json bench/results/step.jsonl

All arms take the same recipe (ResNet-50, K = 65536, 2×224 + 6×96 unless asked otherwise) and the same random crops,
which lie in the device's memory. The arms:

- published: the published code's step, in float16 on a GPU and in float32 on a CPU, whatever --precision says;
- stock: well-tuned stock PyTorch, in bfloat16 unless --precision is fp32;
- ours: this project's step. In their names, "fused" means batch norm in our own kernels, "compiled" torch.compile,
  "graphed" recorded CUDA graphs, and "aside" the teacher on a stream of its own.

A ViT has AdamW and drop path as published, and no batch norm to fuse. The published arm has the published attention,
which keeps all weights in memory, and stock has torch's fused one. Their drop path is drawn by torch on the device,
ours as in the training loop.

An arm that cannot run here, or fails, is left out, with a line that says why. Each arm runs one round when it is built,
which counts only if nothing else was measured. The figures of a round:

- images: images a second;
- step: ms a step; on a GPU between two events;
- host: ms until the call of one step returns, while the GPU is idle (GPU only);
- compute: TFLOP/s of convolutions and matrix products, counted from the layers (dino_fast/model/flops.py);
- memory: MB of the GPU's memory at the arm's peak, with its crops (GPU only);
- ... roofline: percent of each bound of bench/roofline.py, whose probes run in the same round (ResNet-50 only);
- traffic: GB/s that a step would move at this speed if all pointwise work were fused; eager steps move a third more;
- GEMM share, copy share: compute and traffic, in percent of what the probes reach in the same round.

After the rounds, each arm runs one more step under torch's profiler, on a GPU always, on a CPU with --profile or
--kernels. It prints the most expensive kernels, and gives "launches", the kernels of a step (GPU only). With --profile
it also gives the ms in each class of kernels. On a CPU these are operators, each without the operators that it calls.
Classes go by names: a compiled kernel that does batch norm and more counts as batch norm, and a loop over parameters
counts as pointwise where it multiplies and adds. With --kernels each kernel of each arm becomes one line of JSON: arm,
kernel (the start of its name), class, launches a step, ms a step.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
import torch._dynamo

from bench import roofline
from bench.kernel_classes import CLASSES, make_kernel_rows, make_profile_figures, print_kernels, profile_step
from bench.records import make_records, report, save_partial, to_json_lines
from bench.step_arms import ARM_KINDS, Arm, build_arms, measure_round
from bench.step_recipe import add_recipe_arguments, build_recipe, choose_device, describe_recipe
from bench.timing import Figures, attempt, print_left_out, run_interleaved
from dino_fast.config import Recipe
from dino_fast.step.precision import DTYPES

# Compiled graphs of one function. Arms have three each, and beyond its own limit of 8 torch would not compile.
GRAPHS = 64
PROBES = "probes"
UNITS = (
    {"images": "img/s", "step": "ms", "host": "ms", "compute": "TFLOP/s", "memory": "MB", "launches": "kernels"}
    | {"traffic": "GB/s", "GEMM share": "%", "copy share": "%"}
    | {f"{name} roofline": "%" for name in roofline.TRAFFIC}
    | {f"in {kind}": "ms" for kind in CLASSES}
    | {"bandwidth": "GB/s"}
)


def add_shares(rounds: dict[str, list[Figures]], recipe: Recipe) -> None:
    """Add each arm's shares of the probes and of the rooflines of the same round. Without probes there are none."""
    if PROBES not in rounds:
        return
    fused = roofline.count_traffic(recipe)["pointwise-fused"]
    for number, probed in enumerate(rounds[PROBES]):
        bounds = roofline.make_rooflines(probed, recipe)
        for figures in (of_arm[number] for name, of_arm in rounds.items() if name != PROBES):
            figures |= {f"{name} roofline": 100 * figures["images"] / bound for name, bound in bounds.items()}
            figures["GEMM share"] = 100 * figures["compute"] / probed["compute"]
            figures["traffic"] = figures["images"] * fused / 1e9
            figures["copy share"] = 100 * figures["traffic"] / probed["bandwidth"]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_recipe_arguments(parser)
    parser.add_argument(
        "--only", nargs="+", metavar="ARM", choices=ARM_KINDS, default=list(ARM_KINDS),
        help=f"arms to measure: {', '.join(ARM_KINDS)}; all by default",
    )  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="give the ms in each class of kernels")
    parser.add_argument("--kernels", type=Path, metavar="FILE", help="append every kernel of each arm, as JSON lines")
    return parser.parse_args()


def main() -> None:
    """Measure the arms, and report their records."""
    options = parse_arguments()
    torch._dynamo.config.recompile_limit = GRAPHS
    recipe, device = build_recipe(options), choose_device(options.precision)
    arms: dict[str, Arm] = {}
    rounds = measure_arms(options, recipe, device, arms)
    if not rounds:
        raise SystemExit("no arm was measured")
    add_shares(rounds, recipe)
    if PROBES in rounds:
        rounds |= roofline.make_roofline_arms(rounds[PROBES], recipe)
    print(describe_recipe(recipe, device))
    report(make_records("step", UNITS, rounds), options.json)
    if options.profile or options.kernels or device.type == "cuda":
        for name, arm in arms.items():
            if name in rounds:
                attempt(name, partial(profile_arm, name, arm, device, options))


def measure_arms(
    options: argparse.Namespace, recipe: Recipe, device: torch.device, arms: dict[str, Arm]
) -> dict[str, list[Figures]]:
    """Build the arms into `arms`, and return the figures of all rounds.

    After a KeyboardInterrupt before the first complete round, these are the figures of the arms' first rounds.
    """
    save = partial(save_partial, "step", UNITS, options.json)
    kinds = {name: ARM_KINDS[name] for name in options.only}
    first: dict[str, list[Figures]] = {}
    try:
        for name, arm, figures in build_arms(kinds, recipe, device, options.steps):
            arms[name], first[name] = arm, [figures]
            save(first)
        timed = {name: partial(measure_round, arm, recipe, device, options.steps) for name, arm in arms.items()}
        if recipe.backbone == roofline.BACKBONE:
            timed[PROBES] = partial(roofline.run_probes, device, DTYPES[recipe.precision])
        else:
            print_left_out("rooflines", f"the memory traffic of {recipe.backbone} is not known")
        return run_interleaved(timed, options.rounds, save, uncounted=0) if arms else {}
    except KeyboardInterrupt:
        print(f"interrupted: only the first round of {', '.join(first) or 'no arm'} was measured")
        return first


def profile_arm(name: str, arm: Arm, device: torch.device, options: argparse.Namespace) -> None:
    """Run one more step under the profiler, report its figures, and write its kernels to --kernels."""
    timed = profile_step(arm, device)
    figures = make_profile_figures(timed, device, options.profile)
    report(make_records("step", UNITS, {name: [figures]}), options.json)
    rows = make_kernel_rows(name, timed)
    print_kernels(name, rows)
    if options.kernels is not None:
        with open(options.kernels, "a", encoding="utf-8") as out:
            out.write(to_json_lines(rows))


if __name__ == "__main__":
    main()
