"""Draw docs/overview.svg: the data path, and the measured throughput beside its peers.

    python -m docs.draw_overview

The bars come from the raw files of bench/results. Only the standard library is needed. The drawing follows the reader's
light or dark mode.
"""

from pathlib import Path
from typing import NamedTuple

from bench.tables import COMPILED_STEP, END_TO_END, PUBLISHED_STEP, STEP, Key, Record, describe_machine, read_records

OUTPUT = Path(__file__).resolve().parent / "overview.svg"

WIDTH, HEIGHT = 960, 530
MARGIN = 20

STYLE = """
  svg { --paper: #ffffff; --ink: #1f2933; --faint: #5b6773; --line: #9aa5b1; --box: #eef2f6; --ours: #00796b;
        --peer: #9fb3c8; }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #15191e; --ink: #e8edf2; --faint: #a7b2bd; --line: #6b7681; --box: #242b33; --ours: #26a69a;
          --peer: #52667a; }
  }
  text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; font-size: 14px; fill: var(--ink); }
  .title { font-size: 16px; font-weight: 600; }
  .note { font-size: 12px; fill: var(--faint); }
  .box { fill: var(--box); stroke: var(--line); }
  .arrow { stroke: var(--line); stroke-width: 1.5; fill: none; }
  .head { fill: var(--line); }
  .ours { fill: var(--ours); }
  .peer { fill: var(--peer); }
"""


class Stage(NamedTuple):
    """A box of the data path."""

    title: str
    """first line"""
    notes: tuple[str, ...]
    """further lines"""


class Bar(NamedTuple):
    """A bar of the chart."""

    label: str
    """what was measured"""
    key: Key
    """where the result is"""
    ours: bool
    """whether it is a result of this project"""


STAGES = (
    (
        Stage("images", ("folders, tar, zip,", "parquet, s3://")),
        Stage("tar shards", ("make-shards pack:", "index, sha256, manifest")),
        Stage("order and windows", ("pure functions of", "(seed, step, sample, view)")),
        Stage("8-bit crops", ("DALI or torch:", "each image decoded once")),
    ),
    (
        Stage("batch", ("one kernel: flip, jitter,", "blur, solarize, normalize")),
        Stage("teacher and student", ("teacher: global views", "student: all views")),
        Stage("loss and backward", ("fused DINO loss,", "centered teacher targets")),
        Stage("update", ("clip, optimizer and EMA", "in three launches")),
    ),
)

BARS = (
    Bar("published code, step", PUBLISHED_STEP, ours=False),
    Bar("stock PyTorch, torch.compile, step", COMPILED_STEP, ours=False),
    Bar("dino_fast, step", STEP, ours=True),
    Bar("dino_fast, loader + step", END_TO_END, ours=True),
)

BOX_WIDTH, BOX_HEIGHT, BOX_GAP = 206, 78, 32
ROW_TOPS = (48, 158)
CHART_TOP = 282
BAR_LEFT, BAR_HEIGHT, BAR_STEP = 270, 28, 42
BAR_SPACE = 560  # pixels of the longest bar


def draw(records: dict[Key, Record]) -> str:
    """Return the drawing as the text of an SVG file."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="The data path of dino_fast, and its measured throughput beside its peers">',
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" style="fill: var(--paper)"/>',
        _text(MARGIN, 32, "From images to an update", "title"),
        *_draw_path(),
        *_draw_chart(records),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _draw_path() -> list[str]:
    parts = []
    for top, row in zip(ROW_TOPS, STAGES, strict=True):
        for number, stage in enumerate(row):
            left = MARGIN + number * (BOX_WIDTH + BOX_GAP)
            parts += _draw_box(left, top, stage)
            if number:
                parts.append(_draw_arrow(left - BOX_GAP + 4, top + BOX_HEIGHT / 2, left - 3))
    return [*parts, _draw_turn()]


def _draw_box(left: float, top: float, stage: Stage) -> list[str]:
    middle = left + BOX_WIDTH / 2
    box = f'<rect class="box" x="{left}" y="{top}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6"/>'
    lines = [_text(middle, top + 24, stage.title, "title", "middle")]
    lines += [
        _text(middle, top + 26 + 18 * number, note, "note", "middle") for number, note in enumerate(stage.notes, 1)
    ]
    return [box, *lines]


def _draw_arrow(start: float, height: float, end: float) -> str:
    return (
        f'<path class="arrow" d="M{start},{height} H{end - 6}"/>'
        f'<path class="head" d="M{end - 8},{height - 5} L{end},{height} L{end - 8},{height + 5} Z"/>'
    )


def _draw_turn() -> str:
    """Return the arrow from the end of the first row to the start of the second."""
    start_x = MARGIN + 3 * (BOX_WIDTH + BOX_GAP) + BOX_WIDTH / 2
    end_x, middle = MARGIN + BOX_WIDTH / 2, (ROW_TOPS[0] + BOX_HEIGHT + ROW_TOPS[1]) / 2
    return (
        f'<path class="arrow" d="M{start_x},{ROW_TOPS[0] + BOX_HEIGHT} V{middle} H{end_x} V{ROW_TOPS[1] - 8}"/>'
        f'<path class="head" d="M{end_x - 5},{ROW_TOPS[1] - 9} L{end_x},{ROW_TOPS[1] - 1} L{end_x + 5},'
        f'{ROW_TOPS[1] - 9} Z"/>'
    )


def _draw_chart(records: dict[Key, Record]) -> list[str]:
    medians = [records[bar.key]["median"] for bar in BARS]
    scale = BAR_SPACE / max(medians)
    machines = {describe_machine(records[bar.key]) for bar in BARS}
    parts = [_text(MARGIN, CHART_TOP, f"Images a second on one {' or '.join(sorted(machines))}", "title")]
    parts.append(
        _text(MARGIN, CHART_TOP + 22, "ResNet-50, 2×224 + 6×96 crops, 128 images a step; more is better", "note")
    )
    for number, (bar, median) in enumerate(zip(BARS, medians, strict=True)):
        top = CHART_TOP + 44 + number * BAR_STEP
        middle, length = top + BAR_HEIGHT / 2 + 5, round(median * scale, 1)
        kind = "ours" if bar.ours else "peer"
        parts.append(_text(BAR_LEFT - 12, middle, bar.label, "label", "end"))
        parts.append(f'<rect class="{kind}" x="{BAR_LEFT}" y="{top}" width="{length}" height="{BAR_HEIGHT}" rx="3"/>')
        parts.append(_text(BAR_LEFT + length + 10, middle, f"{median:,.0f}", "label"))
    bottom = CHART_TOP + 44 + len(BARS) * BAR_STEP + 14
    return [*parts, _text(MARGIN, bottom, _describe_sources(), "note")]


def _describe_sources() -> str:
    files = dict.fromkeys(bar.key.file for bar in BARS)
    sessions = {file.partition("/")[0] for file in files}
    return f"Medians from bench/results: {', '.join(files)}. {len(sessions)} sessions on machines of one kind."


def _text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    safe = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{safe}</text>'


def main() -> None:
    """Write the drawing."""
    OUTPUT.write_text(draw(read_records()), encoding="utf-8")


if __name__ == "__main__":
    main()
