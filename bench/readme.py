"""Draw the table of measurements in README.md from the raw files in bench/results/.

    python -m bench.readme

The table stands between two markers and holds the newest record of each bench, arm and metric.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARKERS = re.compile(r"(<!-- measured:begin -->\n).*?(<!-- measured:end -->)", re.DOTALL)


def newest(folder: Path) -> list[dict[str, Any]]:
    """The last record of each bench, source, arm and metric, in the order in which they were first seen."""
    found: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found[row["bench"], path.name, row["arm"], row["metric"]] = {**row, "file": path.name}
    return list(found.values())


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, one row a record."""
    lines = ["| what | median (quartiles) | n | machine | raw file |", "|---|---|---|---|---|"]
    for row in rows:
        machine = row["machine"]["gpu"] or f"{row['machine']['cores']} cores of {row['machine']['cpu']}"
        spread = f"{row['median']:.0f} {row['unit']} ({row['q25']:.0f} to {row['q75']:.0f})"
        lines.append(f"| {row['bench']}: {row['arm']} | {spread} | {row['n']} | {machine} | `{row['file']}` |")
    return "\n".join(lines) + "\n"


def main() -> None:
    readme = ROOT / "README.md"
    drawn = table(newest(ROOT / "bench" / "results"))
    readme.write_text(MARKERS.sub(lambda found: found[1] + drawn + found[2], readme.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
