"""Other people's multi-crop loaders, written from their descriptions: what ours is measured beside.

Each is an endless iterator of batches of normalised crops, float32 [B, 3, S, S] a view, from a folder of pictures in
class folders, by our own recipes. A step whose probability is 0 is left out. They draw by their own random numbers.
"""

import io
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torchvision.transforms as v1
import torchvision.transforms.v2 as v2
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, default_collate
from torch.utils.dlpack import from_dlpack
from torchvision.datasets import ImageFolder

from pipelines.crops import CropRecipe
from pipelines.photometric import BLUR_RADIUS, MEAN, SOLARIZE_THRESHOLD, STD, PhotometricRecipe
from shards.index import ShardIndex

ENDLESS = 2**40  # pictures
RATIO = (3 / 4, 4 / 3)  # of a window's width to its height
BICUBIC = v1.InterpolationMode.BICUBIC

Views = list[Tensor]  # float32 [B, 3, S, S] a view
Window = tuple[int, int, int, int]  # top, left, height, width in pixels
Levels = npt.NDArray[np.uint8]  # [S, S, 3]


@dataclass(frozen=True)
class Peer:
    """A loader, and what it makes of a window that is given to it rather than drawn."""

    batches: Callable[[Path, CropRecipe, PhotometricRecipe, int, int], Iterator[Views]]
    """(folder, crops, colours, batch, cores): batches, endlessly"""
    crop: Callable[[bytes, Window, int], Levels]
    """(encoded picture, window, side): its decoder and its resampler"""


@dataclass(frozen=True)
class ViewRecipe:
    """What distinguishes one view of a picture from another."""

    size: int  # pixels
    scale: tuple[float, float]  # share of the picture's area
    blur: float  # probability
    solarize: float  # probability


def view_recipes(crops: CropRecipe, colours: PhotometricRecipe) -> list[ViewRecipe]:
    """One a view, globals first."""
    return [
        ViewRecipe(crops.global_size, crops.global_scale, colours.blur_global_1, 0.0),
        ViewRecipe(crops.global_size, crops.global_scale, colours.blur_global_2, colours.solarize_global_2),
    ] + [ViewRecipe(crops.local_size, crops.local_scale, colours.blur_locals, 0.0)] * crops.locals


def unpack(index: ShardIndex, folder: Path) -> None:
    """Write every sample to a file of its own below `folder`, in class folders, as users of other loaders keep them."""
    for number, label in enumerate(index.labels.tolist()):
        [sample] = index.read([number])
        with Image.open(io.BytesIO(sample)) as picture:
            suffix = (picture.format or "jpeg").lower()
        place = folder / (index.classes[label] if label >= 0 else "unlabelled")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:08d}.{suffix}").write_bytes(sample)


# torchvision: on Pillow pictures, as DINO was published, and on 8-bit tensors


class PillowBlur:
    """Pillow's GaussianBlur with a radius uniform in `radii`, pixels."""

    def __init__(self, radii: tuple[float, float]) -> None:
        self._radii = radii

    def __call__(self, picture: Image.Image) -> Image.Image:
        return picture.filter(ImageFilter.GaussianBlur(torch.empty(1).uniform_(*self._radii).item()))


def tensor_blur(sigmas: tuple[float, float]) -> v2.GaussianBlur:
    """torchvision's blur of tensors, as wide as ours."""
    return v2.GaussianBlur(2 * BLUR_RADIUS + 1, sigmas)


def chain(
    kit: Any, view: ViewRecipe, colours: PhotometricRecipe, blur: Callable[..., Any], to_float: Callable[..., Any]
) -> Any:
    """One view's transform. `kit` is one of torchvision's two modules; `blur` makes its blur from the range of sigma,
    and `to_float` takes levels to 0 … 1."""
    jitter = kit.ColorJitter(colours.brightness, colours.contrast, colours.saturation, colours.hue)
    steps = [
        (1.0, kit.RandomResizedCrop(view.size, view.scale, RATIO, BICUBIC, antialias=True)),
        (colours.flip, kit.RandomHorizontalFlip(colours.flip)),
        (colours.jitter, kit.RandomApply([jitter], colours.jitter)),
        (colours.grey, kit.RandomGrayscale(colours.grey)),
        (view.blur, kit.RandomApply([blur(colours.blur_sigma)], view.blur)),
        (view.solarize, kit.RandomSolarize(SOLARIZE_THRESHOLD, view.solarize)),
        (1.0, to_float),
        (1.0, kit.Normalize(MEAN, STD)),
    ]
    return kit.Compose([step for probability, step in steps if probability])


class MultiCrop:
    """A picture to its views, each by a chain of its own."""

    def __init__(self, chains: list[Callable[[Any], Tensor]]) -> None:
        self._chains = chains

    def __call__(self, picture: Any) -> Views:
        return [chain(picture) for chain in self._chains]


def pillow_crops(crops: CropRecipe, colours: PhotometricRecipe) -> MultiCrop:
    """torchvision's first transforms, on a Pillow picture."""
    return MultiCrop([chain(v1, view, colours, PillowBlur, v1.ToTensor()) for view in view_recipes(crops, colours)])


def tensor_crops(crops: CropRecipe, colours: PhotometricRecipe) -> MultiCrop:
    """torchvision's second transforms, on uint8 [3, H, W]."""
    to_float = v2.ToDtype(torch.float32, scale=True)
    return MultiCrop([chain(v2, view, colours, tensor_blur, to_float) for view in view_recipes(crops, colours)])


def load_pillow(file: str | os.PathLike[str] | io.BytesIO) -> Image.Image:
    """A picture in RGB."""
    with Image.open(file) as picture:
        return picture.convert("RGB")


def load_tensor(file: str | os.PathLike[str] | io.BytesIO) -> Tensor:
    """A picture as uint8 [3, H, W]. Pillow decodes: torchvision's own decoders warn of their end."""
    return v2.functional.pil_to_tensor(load_pillow(file))


def from_workers(dataset: ImageFolder, batch: int, cores: int) -> Iterator[Views]:
    """torch's DataLoader with a worker process a core, over one epoch without end: no worker waits at a border."""
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


def published(folder: Path, crops: CropRecipe, colours: PhotometricRecipe, batch: int, cores: int) -> Iterator[Views]:
    """DINO's published pipeline: Pillow pictures, torchvision's first transforms, worker processes."""
    return from_workers(ImageFolder(folder, pillow_crops(crops, colours), loader=load_pillow), batch, cores)


def on_tensors(folder: Path, crops: CropRecipe, colours: PhotometricRecipe, batch: int, cores: int) -> Iterator[Views]:
    """torchvision's second transforms on 8-bit tensors, worker processes."""
    return from_workers(ImageFolder(folder, tensor_crops(crops, colours), loader=load_tensor), batch, cores)


def pillow_crop(sample: bytes, window: Window, size: int) -> Levels:
    """The reference: Pillow's crop, then its bicubic resize."""
    top, left, height, width = window
    cut = load_pillow(io.BytesIO(sample)).crop((left, top, left + width, top + height))
    return np.asarray(cut.resize((size, size), Image.Resampling.BICUBIC))


def v1_crop(sample: bytes, window: Window, size: int) -> Levels:
    picture = load_pillow(io.BytesIO(sample))
    return np.asarray(v1.functional.resized_crop(picture, *window, [size, size], BICUBIC))


def v2_crop(sample: bytes, window: Window, size: int) -> Levels:
    picture = load_tensor(io.BytesIO(sample))
    return v2.functional.resized_crop(picture, *window, [size, size], BICUBIC).permute(1, 2, 0).numpy()


# SPDL: threads


def spdl_threads(
    folder: Path, crops: CropRecipe, colours: PhotometricRecipe, batch: int, cores: int
) -> Iterator[Views]:
    """SPDL's pipeline with a thread a core, and in it what `on_tensors` has in its workers.

    SPDL's own decoding and cropping are not in it: they are FFmpeg's, whose libraries its wheels do not bring, and one
    FFmpeg filter graph a window has no colours of torchvision's law.
    """
    from spdl.pipeline import PipelineBuilder

    transform = tensor_crops(crops, colours)
    paths = [path for path, _ in ImageFolder(folder).samples]
    builder: Any = PipelineBuilder()
    pipeline = (
        builder.add_source(shuffled(paths))
        .pipe(lambda path: transform(load_tensor(path)), concurrency=cores)
        .aggregate(batch)
        .pipe(default_collate)
        .add_sink(2)
        .build(num_threads=cores, max_failures=0)
    )
    with pipeline.auto_stop():
        yield from pipeline


def shuffled(paths: list[str]) -> Iterator[str]:
    """`paths` in one random order after another."""
    while True:
        yield from random.sample(paths, len(paths))


# DALI: its own operators


def dali_operators(
    folder: Path, crops: CropRecipe, colours: PhotometricRecipe, batch: int, cores: int, on_gpu: bool = False
) -> Iterator[Views]:
    """A DALI graph from files to normalised crops, with nothing of ours in it, on the CPU or the current GPU.

    Its colours are not torchvision's: contrast turns around level 128, hue is linear in YIQ, the order is fixed. It has
    no operator that greys or solarises; a saturation of 0 and arithmetic do. A batch is valid until the next.
    """
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(enable_conditionals=True)
    def graph() -> tuple[Any, ...]:
        encoded, _ = fn.readers.file(file_root=str(folder), random_shuffle=True)
        pictures = fn.decoders.image(
            encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB, adjust_orientation=False
        )
        return tuple(dali_view(pictures, view, colours) for view in view_recipes(crops, colours))

    pipeline = graph(
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


def dali_view(pictures: Any, view: ViewRecipe, colours: PhotometricRecipe) -> Any:
    """One view of the graph's `pictures`. DALI compiles the `if`s on coins: pictures that are not chosen go round."""
    from nvidia.dali import fn, math, types

    pictures = fn.random_resized_crop(
        pictures, size=view.size, random_area=view.scale, random_aspect_ratio=RATIO, interp_type=types.INTERP_CUBIC
    )
    if colours.jitter or colours.grey:
        pictures = fn.color_twist(pictures, **dali_twist(colours))
    if view.blur:
        blur = fn.random.coin_flip(probability=view.blur, dtype=types.BOOL)
        if blur:
            pictures = fn.gaussian_blur(pictures, sigma=fn.random.uniform(range=colours.blur_sigma))
    if view.solarize:
        solarize = fn.random.coin_flip(probability=view.solarize, dtype=types.BOOL)
        if solarize:
            pictures = math.min(pictures, types.Constant(255, dtype=types.UINT8) - pictures)
    return fn.crop_mirror_normalize(
        pictures,
        mirror=fn.random.coin_flip(probability=colours.flip),
        mean=[255 * mean for mean in MEAN],
        std=[255 * std for std in STD],
        dtype=types.FLOAT,
        output_layout="CHW",
    )


def dali_twist(colours: PhotometricRecipe) -> dict[str, Any]:
    """The arguments of DALI's color_twist, neutral for the pictures that are not to be changed."""
    from nvidia.dali import fn

    def change(strength: float) -> Any:
        return jitter * fn.random.uniform(range=(-strength, strength)) if strength else 0.0

    jitter = fn.random.coin_flip(probability=colours.jitter)
    coloured = fn.random.coin_flip(probability=1 - colours.grey)
    return {
        "brightness": 1 + change(colours.brightness),
        "contrast": 1 + change(colours.contrast),
        "saturation": coloured * (1 + change(colours.saturation)),
        "hue": 360 * change(colours.hue),  # degrees
    }


def dali_crop(sample: bytes, window: Window, size: int, on_gpu: bool = False) -> Levels:
    """DALI's decoder, and its resize of a region: what random_resized_crop does with the window it has drawn."""
    top, left, height, width = window
    pipeline = dali_crop_graph(size, on_gpu)
    pipeline.feed_input("encoded", [np.frombuffer(sample, np.uint8)])
    pipeline.feed_input("corners", [np.array([top, left, top + height, left + width], np.float32)])
    [output] = pipeline.run()
    return from_dlpack(output.as_tensor())[0].cpu().numpy().copy()


@cache
def dali_crop_graph(size: int, on_gpu: bool) -> Any:
    """A graph for one picture at a time, from inputs `encoded` and `corners` (top, left, bottom, right)."""
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(1, 1, torch.cuda.current_device() if on_gpu else None, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        corners = fn.external_source(name="corners", dtype=types.FLOAT, ndim=1)
        pictures = fn.decoders.image(
            encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB, adjust_orientation=False
        )
        region = {"roi_start": corners[0:2], "roi_end": corners[2:4]}
        pipeline.set_outputs(fn.resize(pictures, size=(size, size), interp_type=types.INTERP_CUBIC, **region))
    pipeline.build()
    return pipeline


def installed(module: str) -> bool:
    """Whether `module`, dots and all, can be imported here."""
    package = module.partition(".")[0]
    return find_spec(package) is not None and find_spec(module) is not None


def available() -> dict[str, Peer]:
    """The peers that run on this machine, by name."""
    peers = {"published": Peer(published, v1_crop), "torchvision v2 on tensors": Peer(on_tensors, v2_crop)}
    if installed("spdl.pipeline"):
        peers["SPDL threads"] = Peer(spdl_threads, v2_crop)
    if installed("nvidia.dali"):
        peers["DALI's own operators"] = Peer(dali_operators, dali_crop)
        if torch.cuda.is_available():
            on_gpu = Peer(partial(dali_operators, on_gpu=True), partial(dali_crop, on_gpu=True))
            peers["DALI's own operators, GPU"] = on_gpu
    return peers


def left_out() -> list[str]:
    """A line for each peer whose package is not installed."""
    packages = {
        "spdl.pipeline": "SPDL threads: pip install spdl_core",
        "nvidia.dali": "DALI: pip install -e '.[dali]'",
    }
    return [f"left out, {line}" for module, line in packages.items() if not installed(module)]
