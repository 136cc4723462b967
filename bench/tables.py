"""Turn the raw files of bench/results/ into Markdown tables: all rows, and the short table of README.md.

Only the standard library is needed, so that the documentation can be made without torch.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parent / "results"

Record = dict[str, Any]


class Key(NamedTuple):
    """The name of one result: a raw file below bench/results, an arm in it, and a metric of that arm."""

    file: str
    """path below bench/results, with slashes"""
    arm: str
    """arm of the benchmark"""
    metric: str = "images"
    """metric of the arm; "images" is images a second"""


class Peer(NamedTuple):
    """A result that stands beside ours in the short table."""

    name: str
    """what was measured, in words"""
    key: Key
    """where the result is"""


class Row(NamedTuple):
    """A row of the short table."""

    name: str
    """what was measured, in words"""
    ours: Key
    """our result"""
    peers: tuple[Peer, ...]
    """results of the same benchmark to compare with"""


STEP = Key("h200-2/step-gpu.jsonl", "ours-fused-graphed")
PUBLISHED_STEP = Key("h200-2/step-gpu.jsonl", "published")
COMPILED_STEP = Key("h200-1/step-gpu.jsonl", "stock-compiled")
END_TO_END = Key("h200-4/end-to-end-gpu.jsonl", "loader + step, decode_device split")
STEP_ALONE = Key("h200-4/end-to-end-gpu.jsonl", "step alone")
DECODING_ON_GPU = Key("h200-3/sweep-gpu.jsonl", "hw_decoder_load -1.0")

_KERNELS, _LOADER = "h200-2/kernels-gpu.jsonl", "loader-photos256-cpu2.jsonl"
_PACK, _RESUME, _PARITY = "pack-photos-cpu2.jsonl", "resume-cpu2.jsonl", "parity-cpu2.jsonl"

SHORT = (
    Row(
        "Training step: ResNet-50, 2×224 + 6×96, 128 images",
        STEP,
        (Peer("published code", PUBLISHED_STEP), Peer("stock PyTorch with torch.compile", COMPILED_STEP)),
    ),
    Row("The same step, fed from shards by DALI", END_TO_END, (Peer("the step alone", STEP_ALONE),)),
    Row(
        "Loader alone, decoding on the GPU, 16 CPU cores",
        DECODING_ON_GPU,
        (Peer("by its JPEG engines alone", Key("h200-3/sweep-gpu.jsonl", "hw_decoder_load 1.0")),),
    ),
    Row(
        "Loss and center, fp16, on the device alone",
        Key(_KERNELS, "loss fp16: triton", "device"),
        (Peer("published code", Key(_KERNELS, "loss fp16: published", "device")),),
    ),
    Row(
        "Clipping, SGD and EMA, on the device alone",
        Key(_KERNELS, "update: triton", "device"),
        (Peer("published code", Key(_KERNELS, "update: published", "device")),),
    ),
    Row(
        "Loader: 256 photographs, 2×224 + 6×96",
        Key(_LOADER, "torch"),
        (
            Peer("published pipeline", Key(_LOADER, "published")),
            Peer("DALI with its own color operators", Key(_LOADER, "DALI's own operators")),
        ),
    ),
    Row(
        "Packing photographs, every image decoded",
        Key(_PACK, "pack"),
        (Peer("decoding alone", Key(_PACK, "bare decode")),),
    ),
    Row(
        "First batch after a resume at step 4,000,000",
        Key(_RESUME, "step 4000000", "first batch"),
        (Peer("at step 0", Key(_RESUME, "step 0", "first batch")),),
    ),
    Row(
        "Error of fp16 gradients (compiled) compared with fp32, in the first step",
        Key(_PARITY, "ours fp16, compiled", "gradient error"),
        (Peer("published fp16", Key(_PARITY, "published fp16", "gradient error")),),
    ),
)


def read_records(folder: Path = RESULTS) -> dict[Key, Record]:
    """Return the newest record of each file, arm and metric, in the order of the files."""
    found: dict[Key, Record] = {}
    for path in sorted(folder.rglob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "bench" in row:  # other files hold the log of a run, or a list of kernels
                found[Key(path.relative_to(folder).as_posix(), row["arm"], row["metric"])] = row
    return found


def format_number(number: float) -> str:
    """Return a number with at least three digits, and with commas between thousands."""
    size = abs(number)
    if size >= 100 or number == 0:
        return f"{number:,.0f}"
    return f"{number:.1f}" if size >= 10 else f"{number:.3g}"


def format_result(record: Record) -> str:
    """Return a record's median with its unit."""
    return f"{format_number(record['median'])} {record['unit']}"


def describe_machine(record: Record) -> str:
    """Return the GPU of a record, or the CPU cores where no GPU was used."""
    machine = record["machine"]
    return machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"


def make_short_table(records: dict[Key, Record]) -> str:
    """Return the table of README.md: our result, what stands beside it, the machine and the raw files."""
    lines = ["| what | ours | beside it | machine | raw file |", "|---|---|---|---|---|"]
    for name, ours, peers in SHORT:
        beside = "<br>".join(f"{peer.name} {format_result(records[peer.key])}" for peer in peers)
        files = "<br>".join(f"`{file}`" for file in dict.fromkeys([ours.file, *(peer.key.file for peer in peers)]))
        result, machine = format_result(records[ours]), describe_machine(records[ours])
        lines.append(f"| {name} | **{result}** | {beside} | {machine} | {files} |")
    return "\n".join(lines) + "\n"


def make_all_tables(records: dict[Key, Record]) -> str:
    """Return one section for each raw file, with one row for each arm and one column for each metric."""
    files = dict.fromkeys(key.file for key in records)
    return "\n".join(_make_section(file, {k: r for k, r in records.items() if k.file == file}) for file in files)


def _make_section(file: str, records: dict[Key, Record]) -> str:
    arms, metrics = dict.fromkeys(key.arm for key in records), dict.fromkeys(key.metric for key in records)
    newest = max(records.values(), key=lambda record: record["time"])
    units = {key.metric: record["unit"] for key, record in records.items()}
    heads = ["arm", "n", *(f"{metric} ({units[metric]})" for metric in metrics)]
    lines = [f"### {file}", "", _describe_run(newest), "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm in arms:
        of_arm = [records.get(Key(file, arm, metric)) for metric in metrics]
        count = next(record["n"] for record in of_arm if record)
        lines.append(f"| {arm} | {count} | {' | '.join(map(_format_cell, of_arm))} |")
    return "\n".join(lines) + "\n"


def _format_cell(record: Record | None) -> str:
    """Return median and quartiles; the quartiles are left out where there was one round."""
    if record is None:
        return ""
    median, low, high = (format_number(record[name]) for name in ("median", "q25", "q75"))
    return median if record["n"] == 1 else f"{median} ({low} to {high})"


def _describe_run(record: Record) -> str:
    """Return the benchmark, the machine, the versions, the commit, the day and the command of a record."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    command = f" Command: `{record['command']}`." if "command" in record else ""
    return (
        f"Benchmark `{record['bench']}` on {describe_machine(record)}, commit `{record['commit']}`, "
        f"{record['time'][:10]}. {_capitalize(versions)}.{command}"
    )


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def list_keys(rows: Iterable[Row]) -> list[Key]:
    """Return the results that rows of the short table name."""
    return [key for row in rows for key in (row.ours, *(peer.key for peer in row.peers))]
