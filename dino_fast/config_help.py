"""The help of a recipe's settings: `--help` prints the twenty that people change, `--help-all` prints all of them."""

import ast
import dataclasses
import inspect
import itertools
import shutil
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dino_fast.config import Recipe, describe_type, list_settings, look_up

GROUPS: Mapping[str, Sequence[str]] = {
    "Data": ("data.train", "batch_size", "accumulate"),
    "The run": ("output", "epochs", "max_steps", "seed", "init_from", "precision"),
    "Model and views": ("backbone", "head.out_dim", "crops.locals", "crops.local_scale"),
    "Optimization": ("optim.name", "optim.lr", "optim.warmup_epochs", "loss.teacher_temp"),
    "Checkpoints and score": ("checkpoint.every", "knn.train", "knn.val"),
}
_HEAD = """usage: {prog} [--config FILE] [--SETTING VALUE ...]

Train a backbone with DINO on shards. The same command again resumes the run.
On several GPUs: torchrun --nproc_per_node N -m dino_fast.train [--SETTING VALUE ...]

  --config FILE     a recipe in YAML, such as configs/resnet50_100ep.yaml; flags override it wherever they stand
  --print-config    print the whole recipe and exit
  --help            print the settings that people change most
  --help-all        print all settings
"""
_INDENT = " " * 6
_WIDEST = 100  # columns


def print_help_if_asked(prog: str, arguments: Sequence[str]) -> bool:
    """Print the help of a command whose flags are a recipe's settings, if its arguments ask for it. Returns whether."""
    if "--help-all" in arguments or "--help_all" in arguments:
        print(format_help(prog, group_all_settings()))
        return True
    if "--help" in arguments or "-h" in arguments:
        print(format_help(prog, GROUPS, first_sentence_only=True))
        return True
    return False


def format_help(prog: str, groups: Mapping[str, Sequence[str]], first_sentence_only: bool = False) -> str:
    """Return the help text of settings, which are given by their dotted names in groups with a title each."""
    width = min(_WIDEST, shutil.get_terminal_size().columns)
    texts, types, defaults = read_setting_texts(), list_settings(Recipe), Recipe()
    parts = [_HEAD.format(prog=prog)]
    for title, names in groups.items():
        parts.append(f"{title}\n")
        for name in names:
            text = texts[name].partition(". ")[0] if first_sentence_only else texts[name]
            values = describe_type(types[name])
            default = format_default(look_up(defaults, name))
            parts.append(f"  --{name} (default: {default}; {values})")
            parts.append(textwrap.fill(text, width, initial_indent=_INDENT, subsequent_indent=_INDENT))
        parts.append("")
    return "\n".join(parts).rstrip()


def group_all_settings() -> dict[str, list[str]]:
    """Return the dotted names of all settings, grouped by the descriptions of their sections."""
    groups, settings = {}, list_settings(Recipe)
    for prefix, section in list_sections():
        names = [f"{prefix}{field.name}" for field in dataclasses.fields(section)]
        groups[inspect.getdoc(section) or prefix] = [name for name in names if name in settings]
    return groups


def list_sections() -> Iterator[tuple[str, type]]:
    """Yield the recipe and its sections, in their order, each with what its settings' names begin with."""
    yield "", Recipe
    for name, hint in typing.get_type_hints(Recipe, include_extras=True).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield f"{name}.", hint


def read_setting_texts() -> dict[str, str]:
    """Return the description of every setting by its dotted name."""
    return {
        f"{prefix}{name}": text
        for prefix, section in list_sections()
        for name, text in read_field_texts(section).items()
    }


def read_field_texts(section: type) -> dict[str, str]:
    """Return the string under each field of a dataclass, on one line, by the field's name."""
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]).body
    return {
        node.target.id: " ".join(str(following.value.value).split())
        for node, following in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
    }


def format_default(value: Any) -> str:
    """Return a default as it is written on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return str(list(value))
    return "empty" if value == "" else f"{value:g}" if isinstance(value, float) else str(value)
