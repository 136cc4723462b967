"""Draw the table of measurements in README.md from the raw files in bench/results/.

    python -m bench.readme                  # into README.md
    python -m bench.readme --print FOLDER   # of another folder, onto the terminal

The table stands between two markers and holds the newest record of each bench, arm and metric.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from bench.timing import digits

ROOT = Path(__file__).resolve().parents[1]
MARKERS = re.compile(r"(<!-- measured:begin -->\n).*?(<!-- measured:end -->)", re.DOTALL)


def newest(folder: Path) -> list[dict[str, Any]]:
    """The last record of each bench, source, arm and metric, in the order in which they were first seen."""
    found: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for path in sorted(folder.rglob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "bench" not in row:  # a run's own metrics
                continue
            file = path.relative_to(folder).as_posix()
            found[row["bench"], file, row["arm"], row["metric"]] = {**row, "file": file}
    return list(found.values())


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, one row an arm of a raw file, with all its metrics."""
    arms: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        arms.setdefault((row["file"], row["bench"], row["arm"]), []).append(row)
    lines = ["| what | median (quartiles) | n | machine | raw file |", "|---|---|---|---|---|"]
    for (file, bench, arm), found in arms.items():
        of = found[0]["machine"]
        machine = of["gpu"] or f"{of['cores']} cores of {of['cpu']}"
        figures = "; ".join(map(figure, found))
        lines.append(f"| {bench}: {arm} | {figures} | {found[0]['n']} | {machine} | `{file}` |")
    return "\n".join(lines) + "\n"


def figure(row: dict[str, Any]) -> str:
    """A metric: its name, unless that is what a benchmark counts, its median, unit and quartiles."""
    name = "" if row["metric"] == "images" else f"{row['metric']} "
    return f"{name}{digits(row['median'])} {row['unit']} ({digits(row['q25'])} to {digits(row['q75'])})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", type=Path, metavar="FOLDER", help="print the table of this folder's raw files")
    options = parser.parse_args()
    if options.print is not None:
        print(table(newest(options.print)), end="")
        return
    readme = ROOT / "README.md"
    drawn = table(newest(ROOT / "bench" / "results"))
    readme.write_text(MARKERS.sub(lambda found: found[1] + drawn + found[2], readme.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
