"""The samples and labels in tars, by the rules of WebDataset."""

import json
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

from shards.sources.tars import IMAGE_EXTENSIONS, Member

_LABELS = ("cls", "json")
_LABEL_KEYS = ("label", "cls", "class", "class_id", "label_name", "class_name")


class Sample(NamedTuple):
    """Members that belong together."""

    key: str
    """path of the members up to the first dot of the base name"""
    image: Member | None
    """member that holds the image, if there is one"""
    label: Member | None
    """member that holds the label, if there is one"""


def group_samples(members: Iterable[Member]) -> Iterator[Sample]:
    """Yield consecutive members with the same key as one sample, also where it has no image.

    The extension is what follows the first dot of the base name, in any case. Images are jpg, else jpeg, png, webp.
    Labels are cls, else json. An extension that comes twice begins another sample. Names without a dot, hidden names
    and ``__NAME__`` are skipped.
    """
    key: str | None = None
    held: dict[str, Member] = {}
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot or (base.startswith("__") and base.endswith("__")):
            continue
        own, extension = folder + slash + stem, extension.lower()
        if key is not None and (own != key or extension in held):
            yield _make_sample(key, held)
            held.clear()
        key = own
        if extension in IMAGE_EXTENSIONS or extension in _LABELS:
            held[extension] = member
    if key is not None:
        yield _make_sample(key, held)


def parse_label(extension: str, data: bytes) -> str | None:
    """Return the label in a "cls" member (its text) or in a "json" member, or None where there is none.

    In JSON it is the first of the keys label, cls, class, class_id, label_name and class_name that is there and not
    null: a whole number or text. Raises ValueError for what is not UTF-8, not JSON, or another kind of label.
    """
    text = data.decode("utf-8-sig")
    if extension == "cls":
        return text.strip() or None
    try:
        fields = json.loads(text)
    except RecursionError:
        raise ValueError("JSON too deep") from None
    values = (fields.get(key) for key in _LABEL_KEYS) if isinstance(fields, dict) else ()
    value = next((value for value in values if value is not None), "")
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("the label in the JSON is neither a whole number nor text")
    str(value).encode()  # JSON may hold half of a character, which cannot be written
    return str(value).strip() or None


def read_label(file: BinaryIO, sample: Sample) -> str | None:
    """Return the label's text of a sample, read from its tar, or None where it has none.

    Raises ValueError as `parse_label` does.
    """
    if sample.label is None:
        return None
    file.seek(sample.label.offset)
    return parse_label(sample.label.name.rpartition(".")[2].lower(), file.read(sample.label.size))


def _make_sample(key: str, held: dict[str, Member]) -> Sample:
    image, label = (
        next((held[extension] for extension in wanted if extension in held), None)
        for wanted in (IMAGE_EXTENSIONS, _LABELS)
    )
    return Sample(key, image, label)
