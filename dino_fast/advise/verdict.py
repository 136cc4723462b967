"""What the doctor's figures mean: which stage holds a run up, and the setting that would lift it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.crops import CropRecipe
from pipelines.loader import DataRecipe

COLD, WARM = "storage, cold", "storage, in memory"
_DECODE = "decode + crop, "
TORCH, DALI_CPU, DALI_GPU = f"{_DECODE}torch", f"{_DECODE}DALI CPU", f"{_DECODE}DALI GPU"
AUGMENT, LOADER, STEP = "augment", "the whole loader", "the step's demand"

ENOUGH = 1.1  # times the step's demand: less leaves no room for a slow moment
_PACKED = 512  # pixels, the short side that packing may reduce pictures to
_SETTINGS = {TORCH: ("torch", "cpu"), DALI_CPU: ("dali", "cpu"), DALI_GPU: ("dali", "gpu")}  # decode, decode_device


@dataclass(frozen=True)
class Machine:
    """What matters of the machine and the pictures, beside the figures."""

    on_gpu: bool
    cores: int  # of the CPU, for each rank
    short_side: float  # pixels, of the median picture
    in_memory: bool  # whether the kernel can hold all shards


def verdict(rates: Mapping[str, float], data: DataRecipe, crops: CropRecipe, machine: Machine) -> list[str]:
    """In lines: what the bottleneck is, whether the loader keeps up with the step, and what would help if not.

    `rates`: images a second by stage, the storage, decoders and GPU being optional except those that the recipe uses.
    """
    demand, storage = rates[STEP], rates.get(COLD, math.inf)
    # A loader that is measured for seconds lives on the shards that it fetched first.
    supply = rates[LOADER] if machine.in_memory else min(rates[LOADER], storage)
    lines = [_balance(supply, demand)]
    if supply < ENOUGH * demand:
        again = WARM if machine.in_memory or COLD not in rates else COLD  # what reads after the first epoch
        slowest = min([again, decoding(data, machine.on_gpu), AUGMENT], key=rates.__getitem__)
        advice = _advice(slowest, rates, data, crops, machine)
        lines.append(f"Its slowest stage is {slowest}, {digits(rates[slowest])} img/s: {advice}.")
    if machine.in_memory and storage < ENOUGH * demand:
        lines.append(
            f"The first epoch waits for {COLD}, {digits(storage)} img/s; memory can hold all shards for those that "
            f"follow: {_storage_advice(data)}."
        )
    if not machine.on_gpu:
        together = 1 / (1 / supply + 1 / demand)
        lines.append(f"Loader and step share the CPU's cores here: expect some {digits(together)} img/s of a run.")
    return lines


def _balance(supply: float, demand: float) -> str:
    times = supply / demand
    if times >= ENOUGH:
        return f"The step is the bottleneck: the loader keeps up, with {digits(times)} times what the step takes."
    if times >= 1:
        return (
            f"The loader only just keeps up, with {times:.2f} times what the step takes: under {ENOUGH} leaves no room."
        )
    return (
        f"The loader is the bottleneck: it gives {times:.2f} of what the step takes, which will stand still "
        f"{100 * (1 - times):.0f} % of the time."
    )


def decoding(data: DataRecipe, on_gpu: bool) -> str:
    """The stage that decodes in a run of this recipe, as `Loader` chooses it."""
    on_gpu = on_gpu and data.decode_device != "cpu"
    if data.decode == "torch" or (data.decode == "auto" and not on_gpu):
        return TORCH
    return DALI_GPU if on_gpu else DALI_CPU


def _advice(stage: str, rates: Mapping[str, float], data: DataRecipe, crops: CropRecipe, machine: Machine) -> str:
    if stage in (COLD, WARM):
        return _storage_advice(data)
    if stage == AUGMENT:
        return _fewer_views(crops) if machine.on_gpu else _cores_advice(data, crops, machine)
    return _faster_decoder(stage, rates, data, machine.on_gpu) or _cores_advice(data, crops, machine)


def _storage_advice(data: DataRecipe) -> str:
    advice = "keep the shards on faster storage"
    if data.order == "global":
        advice = f"--data.order shards reads whole shards and mixes --data.window of them; or {advice}"
    elif not data.cache:
        advice += ", or copies of them with --data.cache FOLDER"
    return advice


def _faster_decoder(stage: str, rates: Mapping[str, float], data: DataRecipe, on_gpu: bool) -> str:
    """The flags of a decoder that is faster than the one in use; empty where none is."""
    best = max((stage for stage in _SETTINGS if stage in rates), key=rates.__getitem__)
    if rates[best] < ENOUGH * rates[stage]:
        return ""
    settings = dict(zip(("decode", "decode_device"), _SETTINGS[best], strict=True))
    flags = [
        f"--data.{name} {value}"
        for name, value in settings.items()
        if getattr(data, name) != value and (on_gpu or name == "decode")
    ]
    return f"{best.removeprefix(_DECODE)} makes {digits(rates[best])}, so try {' '.join(flags)}"


def _cores_advice(data: DataRecipe, crops: CropRecipe, machine: Machine) -> str:
    if 0 < data.threads < machine.cores:
        return f"there are {machine.cores} cores, so pass --data.threads {machine.cores}"
    ways = ["it takes more cores", *([_fewer_views(crops)] if crops.locals else [])]
    if machine.short_side > _PACKED:
        ways.append(f"pictures packed with `make-shards pack --max-short-side {_PACKED}`")
    return ", or ".join(ways)


def _fewer_views(crops: CropRecipe) -> str:
    return f"fewer local views than --crops.locals {crops.locals}, which changes what is trained"


def digits(figure: float) -> str:
    """With three digits, or all of them before the point."""
    places = 0 if figure >= 99.95 else 1 if figure >= 9.995 else 2
    return f"{figure:,.{places}f}"
