"""RandAugment (Cubuk et al. 2020): a few strong changes of color or shape, drawn at random for each image.

The operations, and the greatest strength of each, are those of torchvision's `v2.RandAugment`. Their draws are not
torch's, but uniform numbers that come from counters. How strong they are is the rule of DeiT ("rand-m9-mstd0.5-inc1"):
two operations are drawn, each is applied with a probability of one half, and its strength is that share of the greatest
one which 9 ± 0.5 is of 10.
"""

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipelines.photometric import MEAN

OPERATIONS_PER_IMAGE = 2
DRAWS = 4 * OPERATIONS_PER_IMAGE  # uniform numbers for each image
MOST = 10.0  # the magnitude of the greatest strength

_APPLY = 0.5  # probability of each operation that was drawn
_SPREAD = 0.5  # standard deviation of the magnitude
_BILINEAR = InterpolationMode.BILINEAR
FILL = [round(255 * mean) for mean in MEAN]  # levels of what comes into the image from outside

# An operation takes an image and its strength, from 0 to 1, or from −1 to 1 if it has two directions.
Operation = Callable[[Image.Image, float], Image.Image]


def _affine(
    image: Image.Image, shift: tuple[float, float] = (0, 0), shear: tuple[float, float] = (0, 0)
) -> Image.Image:
    """Shift an image by pixels, or shear it by degrees, about its top left corner."""
    moved: Image.Image = F.affine(
        image, 0.0, [int(each) for each in shift], 1.0, list(shear), _BILINEAR, fill=FILL, center=[0, 0]
    )
    return moved


def _shear_degrees(strength: float) -> float:
    return float(np.degrees(np.arctan(0.3 * strength)))


def _posterize(image: Image.Image, strength: float) -> Image.Image:
    kept: Image.Image = F.posterize(image, 8 - round(4 * strength))  # bits
    return kept


# Names are torchvision's.
OPERATIONS: dict[str, Operation] = {
    "Identity": lambda image, _: image,
    "ShearX": lambda image, strength: _affine(image, shear=(_shear_degrees(strength), 0)),
    "ShearY": lambda image, strength: _affine(image, shear=(0, _shear_degrees(strength))),
    "TranslateX": lambda image, strength: _affine(image, shift=(150 / 331 * image.width * strength, 0)),
    "TranslateY": lambda image, strength: _affine(image, shift=(0, 150 / 331 * image.height * strength)),
    "Rotate": lambda image, strength: F.rotate(image, 30 * strength, interpolation=_BILINEAR, fill=FILL),
    "Brightness": lambda image, strength: F.adjust_brightness(image, 1 + 0.9 * strength),
    "Color": lambda image, strength: F.adjust_saturation(image, 1 + 0.9 * strength),
    "Contrast": lambda image, strength: F.adjust_contrast(image, 1 + 0.9 * strength),
    "Sharpness": lambda image, strength: F.adjust_sharpness(image, 1 + 0.9 * strength),
    "Posterize": _posterize,
    "Solarize": lambda image, strength: F.solarize(image, 255 * (1 - strength)),
    "AutoContrast": lambda image, _: F.autocontrast(image),
    "Equalize": lambda image, _: F.equalize(image),
}
ONE_DIRECTION = {"Identity", "Posterize", "Solarize", "AutoContrast", "Equalize"}


def rand_augment(image: Image.Image, magnitude: float, draws: npt.NDArray[np.float64]) -> Image.Image:
    """Return an RGB image with up to two operations applied.

    magnitude: the mean strength, from 0 to `MOST`. `draws` [8] are uniform numbers in (0, 1).
    """
    for applied, choice, spread, direction in draws.reshape(OPERATIONS_PER_IMAGE, 4).tolist():
        if applied < _APPLY:
            name = list(OPERATIONS)[int(choice * len(OPERATIONS))]
            strength = float(np.clip(magnitude + _SPREAD * NormalDist().inv_cdf(spread), 0, MOST)) / MOST
            backward = direction < 0.5 and name not in ONE_DIRECTION
            image = OPERATIONS[name](image, -strength if backward else strength)
    return image
