"""Where in a sample the image and the label are, as far as the user says so."""

from dataclasses import dataclass

from shards.errors import UserError


@dataclass(frozen=True)
class Fields:
    """What ``--image-extension``, ``--image-column`` and ``--label-column`` say. By default, SRC is looked at."""

    image_extensions: tuple[str, ...] = ()
    """what follows a sample's key and a dot in the names of its image, lowercase; empty: see `webdataset`"""
    image_column: str | None = None
    """column of a parquet table that holds the images"""
    label_column: str | None = None
    """column of a parquet table that holds the labels"""
    labeled: bool = True
    """whether the labels are wanted"""

    def refuse_unused(self, root: str, kind: str, format: str) -> None:
        """Raise UserError where a flag does not fit the kind of archive in `root`, or the format it is read as."""
        if self.image_extensions and ("tar" not in kind or format not in ("auto", "webdataset")):
            raise UserError(f"{root}: --image-extension is for WebDataset tars. Leave it out.")
        for flag, column in (("--image-column", self.image_column), ("--label-column", self.label_column)):
            if column is not None and kind != "parquet":
                raise UserError(f"{root}: {flag} is for parquet files. Leave it out.")


AS_FOUND = Fields()
