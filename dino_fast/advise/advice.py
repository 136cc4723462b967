"""Conclude from the doctor's figures which stage limits a run, and which setting would make that stage faster."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pipelines.crops import CropRecipe
from pipelines.loader import DataRecipe, DecoderChoice, choose_decoder

# The stages between the shards and the step, as they are printed.
STORAGE, MEMORY = "reading from storage", "reading from memory"
TORCH, DALI_CPU, DALI_GPU = "decoding by torch", "decoding by DALI (CPU)", "decoding by DALI (GPU)"
DALI_SPLIT = "decoding by DALI (CPU, crops on the GPU)"
AUGMENT, LOADER, STEP = "augmentation", "whole loader", "training step"

# What is left of the speed of decoding on a GPU beside a training step: on an H200 1,607 to 1,933 img/s of 4,662 to
# 4,978 (bench/LOG.md).
BESIDE_STEP = 0.4
RESERVE = 1.1  # times the speed of the training step; a loader below it has no reserve for a slow moment
_PACKED_SHORT_SIDE = 512  # pixels, to which packing may reduce images
_DECODER_SETTINGS = {  # data.decode, data.decode_device
    TORCH: ("torch", "cpu"),
    DALI_CPU: ("dali", "cpu"),
    DALI_SPLIT: ("dali", "split"),
    DALI_GPU: ("dali", "gpu"),
}


@dataclass(frozen=True)
class Machine:
    """What the advice depends on besides the figures."""

    on_gpu: bool
    """whether the training step runs on a GPU"""
    cores: int
    """CPU cores for each rank"""
    short_side: float
    """short side of the median image, pixels"""
    fits_in_memory: bool
    """whether the kernel can keep all shards in memory"""


def give_advice(rates: Mapping[str, float], data: DataRecipe, crops: CropRecipe, machine: Machine) -> list[str]:
    """Return lines: what the bottleneck is, whether the loader keeps up with the step, and what would help if not.

    `rates`: images a second of each stage. Storage, decoders and GPU may be missing, except for those that the recipe
    uses.
    """
    device = torch.device("cuda" if machine.on_gpu else "cpu")
    decodes = find_decode_stage(choose_decoder(data, device, data.threads or machine.cores))
    rates = _count_beside_step(rates, decodes)
    needed, storage = rates[STEP], rates.get(STORAGE, math.inf)
    # A loader that is measured for seconds only reads the shards that it fetched at the start.
    supply = rates[LOADER] if machine.fits_in_memory else min(rates[LOADER], storage)
    lines = [_compare(supply, needed)]
    if decodes == DALI_GPU:
        lines.append(
            f"Here {DALI_GPU} counts {100 * BESIDE_STEP:.0f} % of the speed that it has alone, since the training step "
            "uses the GPU, too."
        )
    if supply < RESERVE * needed:
        reading = MEMORY if machine.fits_in_memory or STORAGE not in rates else STORAGE  # after the first epoch
        slowest = min([reading, decodes, AUGMENT], key=rates.__getitem__)
        advice = _advise_on(slowest, rates, data, crops, machine)
        lines.append(f"Its slowest stage is {slowest}, with {format_rate(rates[slowest])} img/s. {advice}.")
    if machine.fits_in_memory and storage < RESERVE * needed:
        lines.append(
            f"The first epoch is slower, because {STORAGE} gives {format_rate(storage)} img/s. Later epochs find all "
            f"shards in memory. {_advise_on_storage(data)}."
        )
    if not machine.on_gpu:
        both = 1 / (1 / supply + 1 / needed)
        lines.append(
            f"On this machine the loader and the training step share the CPU cores. Expect about {format_rate(both)} "
            "img/s in a run."
        )
    return lines


def _compare(supply: float, needed: float) -> str:
    times = supply / needed
    if times >= RESERVE:
        return (
            f"The training step is the bottleneck: the loader is {format_rate(times)} times as fast. The loader needs "
            "no change."
        )
    if times >= 1:
        return (
            f"The loader is only just fast enough: it is {times:.2f} times as fast as the training step. Below "
            f"{RESERVE} times it has no reserve for slow moments."
        )
    return (
        f"The loader is the bottleneck: it is {times:.2f} times as fast as the training step, which will wait for data "
        f"{100 * (1 - times):.0f} % of the time."
    )


def find_decode_stage(choice: DecoderChoice) -> str:
    """Return the stage that decodes with this decoder."""
    if not choice.dali:
        return TORCH
    if choice.device.type == "cpu":
        return DALI_CPU
    return DALI_GPU if choice.on_gpu else DALI_SPLIT


def _count_beside_step(rates: Mapping[str, float], decodes: str) -> dict[str, float]:
    """Return the rates with decoding on the GPU as fast as it is beside a training step.

    `decodes` is the stage that decodes in the run.
    """
    shared = dict(rates)
    if DALI_GPU in rates:
        shared[DALI_GPU] *= BESIDE_STEP
    if decodes == DALI_GPU:
        shared[LOADER] = min(rates[LOADER], shared[DALI_GPU])
    return shared


def _advise_on(stage: str, rates: Mapping[str, float], data: DataRecipe, crops: CropRecipe, machine: Machine) -> str:
    if stage in (STORAGE, MEMORY):
        return _advise_on_storage(data)
    if stage == AUGMENT:
        return f"Pass {_fewer_views(crops)}" if machine.on_gpu else _advise_on_cores(data, crops, machine)
    return _advise_on_decoder(stage, rates, data, machine.on_gpu) or _advise_on_cores(data, crops, machine)


def _advise_on_storage(data: DataRecipe) -> str:
    if data.order == "global":
        return (
            "Pass --data.order shards, which reads whole shards and shuffles --data.shuffle_window of them together, "
            "or keep the shards on faster storage"
        )
    copies = "" if data.cache else ", or pass --data.cache FOLDER to read copies of them on a local disk"
    return f"Keep the shards on faster storage{copies}"


def _advise_on_decoder(stage: str, rates: Mapping[str, float], data: DataRecipe, on_gpu: bool) -> str:
    """Name the flags of a decoder that is faster than the one in use. The text is empty if there is none."""
    best = max((stage for stage in _DECODER_SETTINGS if stage in rates), key=rates.__getitem__)
    if rates[best] < RESERVE * rates[stage]:
        return ""
    settings = dict(zip(("decode", "decode_device"), _DECODER_SETTINGS[best], strict=True))
    flags = [
        f"--data.{name} {value}"
        for name, value in settings.items()
        if getattr(data, name) != value and (on_gpu or name == "decode")
    ]
    return f"Pass {' '.join(flags)}, since {best} gives {format_rate(rates[best])} img/s"


def _advise_on_cores(data: DataRecipe, crops: CropRecipe, machine: Machine) -> str:
    if 0 < data.threads < machine.cores:
        return f"Pass --data.threads {machine.cores}, since there are {machine.cores} CPU cores"
    ways = ["more CPU cores", *([_fewer_views(crops)] if crops.locals else [])]
    if machine.short_side > _PACKED_SHORT_SIDE:
        ways.append(f"smaller images (`make-shards pack --max-short-side {_PACKED_SHORT_SIDE}`)")
    return f"It needs {', or '.join(ways)}"


def _fewer_views(crops: CropRecipe) -> str:
    return f"fewer local views than --crops.locals {crops.locals} (this changes what is trained)"


def format_rate(rate: float) -> str:
    """Write a number with three digits, or with all digits before the decimal point."""
    places = 0 if rate >= 99.95 else 1 if rate >= 9.995 else 2
    return f"{rate:,.{places}f}"
