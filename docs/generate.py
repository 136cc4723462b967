"""Write the generated pages of the documentation.

    python -m docs.generate           # writes what has changed
    python -m docs.generate --check   # writes nothing; the exit status is 1 if a page is out of date

The pages: docs/reference/settings.md from the dataclasses of a recipe, metrics.md from the table of metrics,
commands.md from the help of every command, benchmarks.md and the table in README.md from bench/results, LOG.md from
bench/LOG.md, and overview.svg.
"""

import argparse
import ast
import contextlib
import dataclasses
import inspect
import io
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.tables import make_all_tables, make_short_table, read_records
from dino_fast.__main__ import COMMANDS
from dino_fast.__main__ import main as dino_fast
from dino_fast.config import describe_type
from dino_fast.config_help import format_default, list_sections, read_field_texts
from dino_fast.durations import Duration
from dino_fast.run import metrics
from docs import draw_overview
from shards.__main__ import main as make_shards

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
NOTE = "<!-- Written by `python -m docs.generate`. Change what it is made from, not this page. -->"
MARKERS = re.compile(r"(<!-- measured:begin -->\n).*?(<!-- measured:end -->)", re.DOTALL)

NOT_MEASURED = (
    "Accuracy on ImageNet, several GPUs, training time over a whole run, ViTs, bf16 and other batch sizes than 128 on "
    "a GPU, the loader alone on a quiet GPU machine while CPU threads decode, and other GPUs than the H200."
)

MAKE_SHARDS_COMMANDS = ("pack", "index", "check", "info", "show", "stats")


# ---- Settings


def make_settings_page() -> str:
    """Return the page of every setting: one table for each section of the recipe."""
    parts = [
        "# Every setting",
        NOTE,
        "A setting is a key of a recipe in YAML and a flag of the commands: `optim: {lr: 0.03}` or `--optim.lr 0.03`. "
        "Flags override the recipe. `dino-fast train --config FILE --print-config` prints a whole recipe.",
        "A *length* is a number of epochs, such as `100`, or text such as `5000 steps` or `2M images`.",
        *(make_section(prefix, section) for prefix, section in list_sections()),
    ]
    return "\n\n".join(parts) + "\n"


def make_section(prefix: str, section: type) -> str:
    """Return the heading, the description and the table of a section."""
    title = f"`{prefix[:-1]}`" if prefix else "The run"
    rows = ["| setting | default | values | meaning |", "|---|---|---|---|"]
    hints, texts, defaults = typing.get_type_hints(section, include_extras=True), read_field_texts(section), section()
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[field.name]):
            continue
        name = f"{prefix}{field.name}"
        default, values = show_value(getattr(defaults, field.name)), show_type(hints[field.name])
        rows.append(f"| `{name}` | {default} | {values} | {escape_cell(texts[field.name])} |")
    return f"## {title}\n\n{inspect.getdoc(section)}\n\n" + "\n".join(rows)


def show_value(value: Any) -> str:
    """Return a default as it is written on the command line."""
    return "empty" if value == "" else f"`{format_default(value)}`"


def show_type(hint: Any) -> str:
    """Return in words what a setting may be."""
    return "a length" if hint == Duration else escape_cell(describe_type(hint))


def escape_cell(text: str) -> str:
    """Return text as it may stand in a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


# ---- Metrics


def make_metrics_page() -> str:
    """Return the page of every metric: the keys of metrics.jsonl."""
    tables = (
        (
            "In every row",
            "They describe the steps since the last row. Means leave skipped steps out.",
            metrics.OF_STEPS,
        ),
        ("A look at the teacher and at the step's parts", "They are in every row, too.", metrics.OF_A_LOOK),
        ("k-NN scores", "They have rows of their own, with `step` and `time`.", metrics.OF_A_SCORE),
    )
    parts = [
        "# Every metric",
        NOTE,
        "A run writes one JSON object a line to `metrics.jsonl` in its output folder, every `log_every` steps. "
        "TensorBoard and Weights & Biases get the same figures.",
        *(f"## {title}\n\n{text}\n\n{make_metrics_table(rows)}" for title, text, rows in tables),
    ]
    return "\n\n".join(parts) + "\n"


def make_metrics_table(rows: Mapping[str, metrics.Metric]) -> str:
    """Return a table of metrics with unit and meaning."""
    lines = ["| key | unit | meaning |", "|---|---|---|"]
    return "\n".join(lines + [f"| `{key}` | {unit} | {escape_cell(text)} |" for key, (unit, text) in rows.items()])


# ---- Commands


def make_commands_page() -> str:
    """Return the page of every command's help."""
    parts = [
        "# Every command",
        NOTE,
        "The exit status is 0 for success, 1 for a failed run and 2 for a wrong call. "
        "`dino-fast train` has more: [Running unattended](../running-unattended.md#what-happens-when).",
        "## make-shards",
        show_help(make_shards, "--help"),
        *(f"### make-shards {name}\n\n{show_help(make_shards, name, '--help')}" for name in MAKE_SHARDS_COMMANDS),
        "## dino-fast",
        show_help(dino_fast, "--help"),
        "All settings of `dino-fast train` are on a page of [their own](settings.md).",
        *(f"### dino-fast {name}\n\n{show_help(dino_fast, name, '--help')}" for name in COMMANDS),
        "## Benchmarks",
        *(f"### python -m bench.{name}\n\n```text\n{text}\n```" for name, text in read_benchmarks()),
    ]
    return "\n\n".join(parts) + "\n"


def show_help(command: Callable[[Sequence[str]], Any], *arguments: str) -> str:
    """Return what a command prints for --help, as a block. Figures of this machine are left out."""
    printed = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "80"  # argparse wraps its lines at this width
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            command(list(arguments))
    finally:
        del os.environ["COLUMNS"]
        os.environ.update({} if before is None else {"COLUMNS": before})
    text = re.sub(r",\s+\d+\s+here\)", ")", printed.getvalue()).rstrip()
    return f"```text\n{text}\n```"


def read_benchmarks() -> Iterator[tuple[str, str]]:
    """Yield name and docstring of every module of bench/ that is a command. Nothing is imported."""
    for path in sorted((ROOT / "bench").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if '__name__ == "__main__"' in source:
            yield path.stem, (ast.get_docstring(ast.parse(source)) or "").rstrip()


# ---- Benchmarks


def make_benchmarks_page() -> str:
    """Return the page of all measured results."""
    records = read_records()
    parts = [
        "# Benchmarks",
        NOTE,
        "Every row comes from a raw file in `bench/results/`. A cell holds the median, and the quartiles in brackets "
        "where there was more than one round. `n` is the number of rounds. Arms of one file ran in turn in one "
        "process, after a warm-up. A raw file's newest record counts. "
        "A `+` after a commit means that files had changed since.",
        "`h200-1` to `h200-4` are four separate sessions (leases) of an H200, so their machines may differ. The "
        "training step is measured with 6 local crops.",
        "`img/s` counts source images, not crops. What an arm or a metric means stands under "
        "[the benchmark's command](commands.md#benchmarks). What was expected before each measurement stands in "
        "[the log](LOG.md).",
        "## What is not measured yet",
        NOT_MEASURED,
        "## In short",
        make_short_table(records).rstrip(),
        "## All rows",
        make_all_tables(records).rstrip(),
    ]
    return "\n\n".join(parts) + "\n"


def make_readme() -> str:
    """Return README.md with the short table of results between its markers."""
    text, table = (ROOT / "README.md").read_text(encoding="utf-8"), make_short_table(read_records())
    return MARKERS.sub(lambda found: found[1] + table + found[2], text)


# ---- All pages


def make_log_page() -> str:
    """Return the log of experiments, with the note below its title."""
    title, rest = (ROOT / "bench" / "LOG.md").read_text(encoding="utf-8").split("\n", 1)
    return f"{title}\n\n{NOTE}\n{rest}"


PAGES: dict[Path, Callable[[], str]] = {
    REFERENCE / "settings.md": make_settings_page,
    REFERENCE / "metrics.md": make_metrics_page,
    REFERENCE / "commands.md": make_commands_page,
    REFERENCE / "benchmarks.md": make_benchmarks_page,
    REFERENCE / "LOG.md": make_log_page,
    draw_overview.OUTPUT: lambda: draw_overview.draw(read_records()),
    ROOT / "README.md": make_readme,
}


def find_outdated_pages() -> dict[Path, str]:
    """Return the pages whose file is not what they should be, with what they should be.

    Spaces and line breaks do not count: Python's versions wrap the help of a command in different ways.
    """
    pages = {path: make() for path, make in PAGES.items()}
    return {path: text for path, text in pages.items() if not _is_same(path, text)}


def _is_same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8").split() == text.split()


def main() -> int:
    """Write the pages that are out of date, or name them. Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only name the pages that are out of date")
    options = parser.parse_args()
    outdated = find_outdated_pages()
    for path, text in outdated.items():
        print(f"{path.relative_to(ROOT)} {'is out of date' if options.check else 'is written'}")
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return 1 if options.check and outdated else 0


if __name__ == "__main__":
    raise SystemExit(main())
