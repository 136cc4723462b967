"""Images of kinds that surprise other loaders: by either decoder each has the colors that its file holds.

The images have one color all over, so the expectation is that color, whatever the crop. Transparency is ignored.
"""

import io
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from pipelines.crops import CropRecipe, draw_windows
from pipelines.decode_dali import DaliDecoder
from pipelines.decode_torch import TorchDecoder
from shards.images.decode import decode
from tests.shards.fuzz import chunk, encode, png

RECIPE = CropRecipe(global_size=32, local_size=24, locals=2)
WIDTH, HEIGHT = 61, 45
ORANGE = (200, 120, 60)


def fill(mode: str, color: object, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    return Image.new(mode, (width, height), color)


def palette(**options: object) -> bytes:
    """A palette image whose every pixel is entry 1, orange."""
    image = fill("P", 1)
    image.putpalette([0, 0, 0, *ORANGE])
    return encode(image, "PNG", **options)


def srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def deep(level: int) -> bytes:
    return encode(Image.fromarray(np.full((HEIGHT, WIDTH), level, np.uint16)), "PNG")


KINDS: dict[str, tuple[bytes, tuple[int, int, int]]] = {
    # mhamilton723/STEGO #65: pretrained DINO "only works with RGB images".
    "gray JPEG": (encode(fill("L", 77), "JPEG"), (77, 77, 77)),
    "gray PNG": (encode(fill("L", 77), "PNG"), (77, 77, 77)),
    "black and white PNG": (encode(fill("1", 1), "PNG"), (255, 255, 255)),
    "16-bit gray PNG": (deep(77 * 256 + 200), (77, 77, 77)),
    "gray PNG with transparency": (encode(fill("LA", (77, 0)), "PNG"), (77, 77, 77)),
    # imageio/imageio #475, fastai/fastbook #385: "Palette images with Transparency expressed in bytes".
    "palette": (palette(), ORANGE),
    "palette with a transparent color": (palette(transparency=1), ORANGE),
    "palette with transparency in bytes": (palette(transparency=bytes([255, 0])), ORANGE),
    # NVIDIA/DIGITS #85: the background that replaces transparency. Here it is what the file holds below.
    "RGB PNG with transparency": (encode(fill("RGBA", (*ORANGE, 0)), "PNG"), ORANGE),
    "WebP with transparency": (encode(fill("RGBA", (*ORANGE, 128)), "WEBP", lossless=True, exact=True), ORANGE),
    # mozilla/pdf.js #9513: colors of CMYK JPEG files are inverted. No cyan, all magenta and yellow are red.
    "CMYK JPEG": (encode(fill("CMYK", (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
    "CMYK JPEG, half black": (encode(fill("CMYK", (0, 0, 0, 128)), "JPEG"), (127, 127, 127)),
    # NVIDIA/DALI #1204: "NVJPEG error 4", which progressive files gave.
    "progressive JPEG": (encode(fill("RGB", ORANGE), "JPEG", progressive=True), ORANGE),
    "JPEG without subsampling": (encode(fill("RGB", ORANGE), "JPEG", subsampling=0), ORANGE),
    "JPEG with a color profile": (encode(fill("RGB", ORANGE), "JPEG", icc_profile=srgb()), ORANGE),
    "JPEG with bytes after its end": (encode(fill("RGB", ORANGE), "JPEG") + bytes(1000), ORANGE),
    "interlaced PNG": (png(np.full((HEIGHT, WIDTH, 3), ORANGE, np.uint8), interlaced=True), ORANGE),
    "PNG with a gamma": (
        png(np.full((HEIGHT, WIDTH, 3), ORANGE, np.uint8), before=chunk(b"gAMA", struct.pack(">I", 100_000))),
        ORANGE,
    ),
    # mlverse/torchvision #44: random crops of no height or width.
    "a single pixel": (encode(fill("RGB", ORANGE, 1, 1), "PNG"), ORANGE),
    "one pixel wide": (encode(fill("RGB", ORANGE, 1, 700), "PNG"), ORANGE),
    "one pixel high": (encode(fill("RGB", ORANGE, 700, 1), "JPEG"), ORANGE),
    "one pixel high and very wide": (encode(fill("RGB", ORANGE, 20_000, 1), "PNG"), ORANGE),
}


@pytest.fixture(scope="module", params=["dali", "torch"])
def decoder(request: pytest.FixtureRequest):
    with ThreadPoolExecutor(1) as pool:
        if request.param == "torch":
            yield TorchDecoder(RECIPE, pool)
        else:
            pytest.importorskip("nvidia.dali", reason="DALI is not installed")
            yield DaliDecoder(RECIPE, 2, torch.device("cpu"), threads=1)


@pytest.mark.parametrize("kind", KINDS)
def test_an_odd_image_has_its_colors(decoder, kind: str):
    """Warnings are errors in all tests, so none comes either."""
    data, color = KINDS[kind]
    info = decode(data)  # what packing keeps
    with Image.open(io.BytesIO(data)) as image:
        assert (info.width, info.height) == image.size
    windows = draw_windows(RECIPE, 0, 0, np.array([0]), [info.height], [info.width])
    assert (windows[..., 2:] > 0).all()
    for crops in decoder.decode_one(data, windows):
        assert (crops.int() - torch.tensor(color)).abs().max() <= 3
