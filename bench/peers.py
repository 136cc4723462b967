"""Other people's multi-crop loaders, written from their descriptions, to measure ours beside them.

Each loader is an endless iterator of batches of normalized crops, float32 [B, 3, S, S] for each view. It reads images
from class folders, and makes them by our own recipes. An augmentation whose probability is 0 is left out. The loaders
draw their own random numbers.
"""

import io
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler, default_collate
from torch.utils.dlpack import from_dlpack
from torchvision.datasets import ImageFolder

from bench.peer_views import (
    RATIO,
    Levels,
    ViewRecipe,
    Views,
    Window,
    crop_v1,
    crop_v2,
    list_view_recipes,
    load_pillow,
    load_tensor,
    make_pillow_crops,
    make_tensor_crops,
)
from bench.timing import print_left_out
from pipelines.crops import CropRecipe
from pipelines.photometric import MEAN, STD, PhotometricRecipe
from shards.index import ShardIndex

ENDLESS = 2**40  # images


@dataclass(frozen=True)
class Peer:
    """A loader of other people."""

    batches: Callable[[Path, CropRecipe, PhotometricRecipe, int, int], Iterator[Views]]
    """yields batches without end, from (folder, crops, augment, batch, cores)"""
    crop: Callable[[bytes, Window, int], Levels]
    """decodes and resizes a given window as the loader does, from (encoded image, window, side in pixels)"""


def unpack(index: ShardIndex, folder: Path) -> None:
    """Write every sample to a file of its own in class folders below `folder`, as users of other loaders keep them."""
    for number, label in enumerate(index.labels.tolist()):
        [sample] = index.read([number])
        with Image.open(io.BytesIO(sample)) as image:
            suffix = (image.format or "jpeg").lower()
        place = folder / (index.classes[label] if label >= 0 else "unlabeled")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:08d}.{suffix}").write_bytes(sample)


# torchvision: on Pillow images, as DINO was published, and on 8-bit tensors


def load_published(
    folder: Path, crops: CropRecipe, augment: PhotometricRecipe, batch: int, cores: int
) -> Iterator[Views]:
    """Yield batches of DINO's published pipeline: Pillow images, torchvision's v1 transforms, worker processes."""
    return _load_in_workers(ImageFolder(folder, make_pillow_crops(crops, augment), loader=load_pillow), batch, cores)


def load_tensors(
    folder: Path, crops: CropRecipe, augment: PhotometricRecipe, batch: int, cores: int
) -> Iterator[Views]:
    """Yield batches of torchvision's v2 transforms on 8-bit tensors, in worker processes."""
    return _load_in_workers(ImageFolder(folder, make_tensor_crops(crops, augment), loader=load_tensor), batch, cores)


def _load_in_workers(dataset: ImageFolder, batch: int, cores: int) -> Iterator[Views]:
    """Yield the batches of torch's DataLoader with a worker process for each core.

    They come from one epoch without end, so that no worker waits at the end of an epoch.
    """
    loader = DataLoader(
        dataset,
        batch_size=batch,
        sampler=RandomSampler(dataset, num_samples=ENDLESS),
        num_workers=cores,
        persistent_workers=True,
        prefetch_factor=2,
        pin_memory=torch.cuda.is_available(),
    )
    for views, _ in loader:
        yield views


# SPDL: threads


def load_spdl(folder: Path, crops: CropRecipe, augment: PhotometricRecipe, batch: int, cores: int) -> Iterator[Views]:
    """Yield batches of SPDL's pipeline with a thread for each core, which run what `load_tensors` runs in its workers.

    SPDL's own decoding and cropping are not measured. They are FFmpeg's, whose libraries its wheels do not bring. One
    FFmpeg filter graph for each window also cannot augment as torchvision does.
    """
    from spdl.pipeline import PipelineBuilder

    transform = make_tensor_crops(crops, augment)
    paths = [path for path, _ in ImageFolder(folder).samples]
    builder: Any = PipelineBuilder()
    pipeline = (
        builder.add_source(shuffle_endlessly(paths))
        .pipe(lambda path: transform(load_tensor(path)), concurrency=cores)
        .aggregate(batch)
        .pipe(default_collate)
        .add_sink(2)
        .build(num_threads=cores, max_failures=0)
    )
    with pipeline.auto_stop():
        yield from pipeline


def shuffle_endlessly(paths: list[str]) -> Iterator[str]:
    """Yield `paths` in one random order after another."""
    while True:
        yield from random.sample(paths, len(paths))


# DALI: its own operators


def load_dali(
    folder: Path, crops: CropRecipe, augment: PhotometricRecipe, batch: int, cores: int, on_gpu: bool = False
) -> Iterator[Views]:
    """Yield batches of a DALI graph without any of our code, on the CPU or the current GPU.

    Its color jitter is not torchvision's: contrast turns around level 128, hue is linear in YIQ, and the order is
    fixed. It has no operator for grayscale or solarize; a saturation of 0 and arithmetic take their place. A batch is
    valid until the next one is asked for.
    """
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(enable_conditionals=True)
    def build_graph() -> tuple[Any, ...]:
        encoded, _ = fn.readers.file(file_root=str(folder), random_shuffle=True)
        images = _decode_with_dali(encoded, on_gpu)
        return tuple(_make_dali_view(images, view, augment) for view in list_view_recipes(crops, augment))

    pipeline = build_graph(
        batch_size=batch,
        num_threads=cores,
        device_id=torch.cuda.current_device() if on_gpu else None,
        prefetch_queue_depth=2,
        seed=random.getrandbits(31),
    )
    pipeline.build()
    while True:
        outputs = pipeline.run(torch.cuda.current_stream() if on_gpu else None)
        yield [from_dlpack(output.as_tensor()) for output in outputs]


def _decode_with_dali(encoded: Any, on_gpu: bool) -> Any:
    """Add DALI's decoder to a graph, without EXIF rotation."""
    from nvidia.dali import fn, types

    return fn.decoders.image(
        encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB, adjust_orientation=False
    )


def _make_dali_view(images: Any, view: ViewRecipe, augment: PhotometricRecipe) -> Any:
    """Add one view to a graph. DALI compiles each `if` on a coin: it applies to the images that the coin chooses."""
    from nvidia.dali import fn, math, types

    images = fn.random_resized_crop(
        images, size=view.size, random_area=view.scale, random_aspect_ratio=RATIO, interp_type=types.INTERP_CUBIC
    )
    if augment.jitter or augment.grayscale:
        images = fn.color_twist(images, **_draw_dali_jitter(augment))
    if view.blur:
        blur = fn.random.coin_flip(probability=view.blur, dtype=types.BOOL)
        if blur:
            images = fn.gaussian_blur(images, sigma=fn.random.uniform(range=augment.blur_sigma))
    if view.solarize:
        solarize = fn.random.coin_flip(probability=view.solarize, dtype=types.BOOL)
        if solarize:
            images = math.min(images, types.Constant(255, dtype=types.UINT8) - images)
    return fn.crop_mirror_normalize(
        images,
        mirror=fn.random.coin_flip(probability=augment.flip),
        mean=[255 * mean for mean in MEAN],
        std=[255 * std for std in STD],
        dtype=types.FLOAT,
        output_layout="CHW",
    )


def _draw_dali_jitter(augment: PhotometricRecipe) -> dict[str, Any]:
    """Return the arguments of DALI's color_twist. They change nothing for the images that are not chosen."""
    from nvidia.dali import fn

    def draw_change(strength: float) -> Any:
        return jitter * fn.random.uniform(range=(-strength, strength)) if strength else 0.0

    jitter = fn.random.coin_flip(probability=augment.jitter)
    keep_color = fn.random.coin_flip(probability=1 - augment.grayscale)
    return {
        "brightness": 1 + draw_change(augment.brightness),
        "contrast": 1 + draw_change(augment.contrast),
        "saturation": keep_color * (1 + draw_change(augment.saturation)),
        "hue": 360 * draw_change(augment.hue),  # degrees
    }


def crop_dali(sample: bytes, window: Window, size: int, on_gpu: bool = False) -> Levels:
    """Decode and resize a region with DALI, as its random_resized_crop does with the window that it has drawn."""
    top, left, height, width = window
    pipeline = _build_dali_crop_graph(size, on_gpu)
    pipeline.feed_input("encoded", [np.frombuffer(sample, np.uint8)])
    pipeline.feed_input("corners", [np.array([top, left, top + height, left + width], np.float32)])
    [output] = pipeline.run()
    return from_dlpack(output.as_tensor())[0].cpu().numpy().copy()


@cache
def _build_dali_crop_graph(size: int, on_gpu: bool) -> Any:
    """Build a graph for one image at a time. Its inputs are `encoded` and `corners` (top, left, bottom, right)."""
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(1, 1, torch.cuda.current_device() if on_gpu else None, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        corners = fn.external_source(name="corners", dtype=types.FLOAT, ndim=1)
        images = _decode_with_dali(encoded, on_gpu)
        region = {"roi_start": corners[0:2], "roi_end": corners[2:4]}
        pipeline.set_outputs(fn.resize(images, size=(size, size), interp_type=types.INTERP_CUBIC, **region))
    pipeline.build()
    return pipeline


# Which of them run here


def is_installed(module: str) -> bool:
    """Return whether `module`, which may have dots in its name, can be imported here."""
    package = module.partition(".")[0]
    return find_spec(package) is not None and find_spec(module) is not None


def find_peers() -> dict[str, Peer]:
    """Return the loaders that run on this machine, by name."""
    peers = {"published": Peer(load_published, crop_v1), "torchvision v2 on tensors": Peer(load_tensors, crop_v2)}
    if is_installed("spdl.pipeline"):
        peers["SPDL threads"] = Peer(load_spdl, crop_v2)
    if is_installed("nvidia.dali"):
        peers["DALI's own operators"] = Peer(load_dali, crop_dali)
        if torch.cuda.is_available():
            on_gpu = Peer(partial(load_dali, on_gpu=True), partial(crop_dali, on_gpu=True))
            peers["DALI's own operators, GPU"] = on_gpu
    return peers


def print_missing_peers() -> None:
    """Print a line for each loader whose package is not installed, and how to install it."""
    packages = {
        "spdl.pipeline": ("SPDL threads", "pip install spdl_core"),
        "nvidia.dali": ("DALI", "pip install -e '.[dali]'"),
    }
    for module, (name, command) in packages.items():
        if not is_installed(module):
            print_left_out(name, f"not installed; run {command}")
