"""How many images of a packing have something that is worth knowing before they are trained on."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers of images. Those of two shards are added; of their largest values, the larger one is taken."""

    turned_in_training: int = 0
    """packed images that are to be turned by their EXIF orientation, which training does not do"""
    turned_upright: int = 0
    """images that ``--upright`` turned"""
    converted: int = 0
    """images that ``--convert`` made of other types"""
    gray16: int = 0
    """images of 16-bit grayscale of which the high byte is kept, in training, or already by ``--max-short-side``"""
    gray16_scaled: int = 0
    """images of 16-bit grayscale that ``--gray16`` made 8-bit"""
    gray16_largest: int = 0
    """largest value in images of 16-bit grayscale, before they were scaled; 0 where they were not decoded"""

    def __add__(self, other: "Counts") -> "Counts":
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        total = {name: mine[name] + theirs[name] for name in mine}
        return Counts(**{**total, "gray16_largest": max(self.gray16_largest, other.gray16_largest)})

    def to_dict(self) -> dict[str, int]:
        """Return the numbers that are not 0, by name."""
        return {name: number for name, number in dataclasses.asdict(self).items() if number}
