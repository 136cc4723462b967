"""The samples and labels in tars, by the rules of WebDataset."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

from shards.sources.file_types import is_image
from shards.sources.tars import IMAGE_EXTENSIONS, Member

_LABELS = ("cls", "json")
_OTHER = "/"  # no extension: the place of an image under another one
_LABEL_KEYS = ("label", "cls", "class", "class_id", "label_name", "class_name")


class Sample(NamedTuple):
    """Members that belong together."""

    key: str
    """path of the members up to the first dot of the base name"""
    image: Member | None
    """member that holds the image, if there is one"""
    label: Member | None
    """member that holds the label, if there is one"""
    other: Member | None = None
    """the first member that is an image by its name, but has another extension than images of samples have"""


def group_samples(members: Iterable[Member], image_extensions: Sequence[str] = ()) -> Iterator[Sample]:
    """Yield consecutive members with the same key as one sample, also where it has no image.

    The extension is what follows the first dot of the base name, in any case. Images are jpg, else jpeg, png, webp.
    Labels are cls, else json. An extension that comes twice begins another sample. Names without a dot, hidden names
    and ``__NAME__`` are skipped.

    With `image_extensions`, these are the images', the first that a sample has. They may hold dots, and so may keys:
    the key is what precedes one of them, or the extension of a label. Members with other extensions are skipped.
    """
    wanted = tuple(image_extensions) or IMAGE_EXTENSIONS
    known = sorted((*wanted, *_LABELS), key=len, reverse=True) if image_extensions else ()
    key: str | None = None
    held: dict[str, Member] = {}
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, extension = _split_name(base, known) if known else _split_at_first_dot(base)
        if not stem or stem.startswith(".") or (base.startswith("__") and base.endswith("__")):
            continue
        own = folder + slash + stem
        if key is not None and (own != key or extension in held):
            yield _make_sample(key, held, wanted)
            held.clear()
        key = own
        if extension in wanted or extension in _LABELS:
            held[extension] = member
        elif is_image(base):
            held.setdefault(_OTHER, member)
    if key is not None:
        yield _make_sample(key, held, wanted)


def find_other_images(members: Iterable[Member]) -> dict[str, tuple[Member, Member]]:
    """Return the extensions of images that lie beside a label, as ``--image-extension`` takes them.

    The values are the first such image and its label. Keys of samples may hold dots here, as extensions may.
    """
    members = list(members)
    labels: dict[str, Member] = {}
    for member in members:
        stem, extension = _split_name(member.name, _LABELS)
        if extension:
            labels.setdefault(stem, member)
    found: dict[str, tuple[Member, Member]] = {}
    for member in filter(lambda member: is_image(member.name), members):
        start = member.name.rfind("/") + 1
        for dot in (place for place, letter in enumerate(member.name) if letter == "." and place > start):
            if label := labels.get(member.name[:dot]):
                found.setdefault(member.name[dot + 1 :].lower(), (member, label))
                break
    return found


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


def _split_at_first_dot(name: str) -> tuple[str, str]:
    """Return what precedes and follows the first dot, the latter in lowercase. Both are empty where there is none."""
    stem, dot, extension = name.partition(".")
    return (stem, extension.lower()) if dot else ("", "")


def _split_name(name: str, known: Sequence[str]) -> tuple[str, str]:
    """Return what precedes the first of the `known` extensions that a name ends with, and that extension in lowercase.

    Both are empty where there is none.
    """
    lower = name.lower()
    extension = next((extension for extension in known if lower.endswith(f".{extension}")), "")
    return name[: -len(extension) - 1] if extension else "", extension


def _make_sample(key: str, held: dict[str, Member], image_extensions: Sequence[str]) -> Sample:
    image, label = (
        next((held[extension] for extension in wanted if extension in held), None)
        for wanted in (image_extensions, _LABELS)
    )
    return Sample(key, image, label, held.get(_OTHER))
