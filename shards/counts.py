"""How many images of a packing have something that is worth knowing before they are trained on."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers of images. Those of two shards are added."""

    turned_in_training: int = 0
    """packed images that are to be turned by their EXIF orientation, which training does not do"""
    turned_upright: int = 0
    """images that ``--upright`` turned"""
    converted: int = 0
    """images that ``--convert`` made of other types"""

    def __add__(self, other: "Counts") -> "Counts":
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return Counts(**{name: mine[name] + theirs[name] for name in mine})

    def to_dict(self) -> dict[str, int]:
        """Return the numbers that are not 0, by name."""
        return {name: number for name, number in dataclasses.asdict(self).items() if number}
