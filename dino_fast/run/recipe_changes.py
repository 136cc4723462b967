"""A recipe as plain data and as a file, and in which settings two of them differ."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dino_fast.config import Recipe
from shards.storage.atomic_write import make_temporary_path

# Settings that may differ between two processes of one run: they change where and how it runs, not its result.
FREE_TO_CHANGE = (
    "output", "max_steps", "device", "activation_checkpointing", "compile", "graph", "log_every", "init_from",
    "dump_crops", "wandb", "timeout", "accept_changes", "checkpoint", "health", "knn",
    "data.train", "data.threads", "data.prefetch", "data.max_bad_samples", "data.timeout", "data.hw_decoder_load",
    "data.preallocate_size", "data.cache", "data.cache_bytes",
)  # fmt: skip


def to_plain_data(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as checkpoints store it and YAML would give it: with lists instead of tuples."""
    settings: dict[str, Any] = _tuples_to_lists(dataclasses.asdict(recipe))
    return settings


def write_recipe(recipe: Recipe) -> None:
    """Write recipe.yaml into the run's folder. With --config and another --output it gives the same run again."""
    output, text = Path(recipe.output), yaml.safe_dump(to_plain_data(recipe), sort_keys=False, allow_unicode=True)
    with make_temporary_path(output, "recipe.yaml") as temporary:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(output / "recipe.yaml")


def _tuples_to_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuples_to_lists(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def add_defaults(old: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe as plain data, with the settings that did not exist yet when it was written."""
    return {
        name: add_defaults(old[name], value) if isinstance(value, dict) and name in old else old.get(name, value)
        for name, value in (old | defaults).items()
    }


def find_differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield `name: old -> new` for each setting that differs and that a resumed run must not change.

    old, new: recipes as plain data.
    """
    for name in sorted(old.keys() | new.keys()):
        if prefix + name in FREE_TO_CHANGE:
            continue
        was, now = old.get(name), new.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from find_differences(was, now, f"{prefix}{name}.")
        elif was != now:
            yield f"{prefix}{name}: {was} -> {now}"
