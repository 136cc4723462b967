"""What the fields of a manifest may hold. Its sha256 is as easily forged as the rest, so every field is checked."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from shards.counts import Counts

Check = Callable[[Any], bool]
# Those from DC80 to DCFF stand for bytes of names that are not UTF-8. The others are no text on any system.
_LONE_SURROGATE = re.compile("[\\ud800-\\udc7f\\udd00-\\udfff]")


def refuse_forged_fields(fields: dict[str, Any]) -> None:
    """Raise ValueError for a manifest with a field that packing never writes."""
    wrong = _find_wrong_fields({"counts": {}, **fields}, _CHECKS)  # absent where nothing is counted
    if not wrong and sum(shard["samples"] for shard in fields["shards"]) != fields["samples"]:
        wrong = ["samples, shards"]
    if wrong:
        raise ValueError(f"not a make-shards manifest ({wrong[0]}: missing, or not what packing writes)")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not _LONE_SURROGATE.search(value)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_file_name(value: Any) -> bool:
    return _is_text(value) and value not in ("", ".", "..") and not {"/", "\0"} & set(value)


def _are_classes(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value)) and len(set(value)) == len(value)


def _are_options(value: Any) -> bool:
    """Check the options that ``make-shards check`` uses. The others are for people."""
    if not isinstance(value, dict):
        return False
    limits = (value.get(name, 1) for name in ("max_pixels", "image_seconds"))
    return all(type(limit) in (int, float) and 0 < limit <= 1 << 40 for limit in limits)


def _are_counts(value: Any) -> bool:
    names = {field.name for field in dataclasses.fields(Counts)}
    return isinstance(value, dict) and names >= value.keys() and all(map(_is_count, value.values()))


def _are_tables(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_file_name, value)) and all(map(_is_text, value.values()))


def _make_list_check(checks: dict[str, Check]) -> Check:
    """Return a check that a value is a list of objects whose fields pass `checks`."""
    return lambda value: (
        isinstance(value, list)
        and not any(not isinstance(entry, dict) or _find_wrong_fields(entry, checks) for entry in value)
    )


def _find_wrong_fields(fields: dict[str, Any], checks: dict[str, Check]) -> list[str]:
    """Return the fields that are missing, unknown, or fail their check."""
    return [
        name
        for name in {**checks, **fields}
        if name not in checks or name not in fields or not checks[name](fields[name])
    ]


_CHECKS: dict[str, Check] = {
    "name": _is_text,
    "fingerprint": _is_hash,
    "samples": _is_count,
    "classes": _are_classes,
    "options": _are_options,
    "shards": _make_list_check({"file": _is_file_name, "samples": _is_count, "bytes": _is_count, "sha256": _is_hash}),
    "index_sha256": _is_hash,
    "ignored": _is_count,
    "rejected": _make_list_check({"source": _is_text, "reason": _is_text}),
    "duplicates": _is_count,
    "foreign": lambda value: isinstance(value, bool),
    "counts": _are_counts,
    "tables": _are_tables,
    "format_version": _is_count,
}
