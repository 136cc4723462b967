"""The words of code and documentation are the field's, spelled as PyTorch spells them.

Add a word here together with what is to be written in its place.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = (
    "dino_fast",
    "pipelines",
    "shards",
    "bench",
    "configs",
    "docs",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
)
KINDS = {".py", ".md", ".yaml", ".sh", ".sbatch", ".toml", ".css"}

# Parts of words, whatever the case, and what is to be written instead.
BANNED = {
    "picture": "image",
    "colour": "color, or color jitter",
    "grey": "gray, or grayscale",
    "centre|centring": "center",
    "neighbour": "neighbor",
    "behaviour": "behavior",
    "favour": "favor",
    r"labell(ed|ing)": "labeled, labeling",
    r"cancell(ed|ing)": "canceled, canceling",
    r"\blicence": "license",
    "solaris(e|ing)": "solarize",
    "normalis(e|ing|ation)": "normalize",
    "synchronis(e|ing|ation)": "synchronize",
    "initialis(e|ing|ation)": "initialize",
    "optimis(e|ing|ation)": "optimize",
    "parallelis(e|ing|ation)": "parallelize",
    "recognis(e|ing)": "recognize",
    "summaris(e|ing)": "summarize",
    "serialis(e|ing)": "serialize",
    "organis(e|ing|ation)": "organize",
    r"\banaly(se|sing)\b": "analyze",
    r"\bjudge|judging": "validate",
    "condemn": "mark as timed out, or as failed",
    r"\bverdict": "advice, or result",
    r"\bsitting": "session of a run, or process",
    r"\bmend": "fix",
    r"\banew\b": "again, or from scratch",
    r"\bshelf\b": "cache",
    r"\bhushed\b": "silenced",
    r"\baugury\b|\bpeculiar": "plain words",
}
# What other people's programs and files are called.
FOREIGN = ("greyscale.html", "org/licences/", "_BINARY_NAMES = ")


def texts() -> Iterator[tuple[Path, int, str]]:
    """Every line of the places, with its file and number."""
    for place in PLACES:
        path = ROOT / place
        files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
        for file in files:
            if file.suffix in KINDS and "results" not in file.parts and file.name != "LOG.md":
                for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                    yield file.relative_to(ROOT), number, line


@pytest.mark.parametrize("word", BANNED)
def test_plain_words(word: str) -> None:
    pattern = re.compile(word, re.IGNORECASE)
    found = [
        f"{file}:{number}: {line.strip()[:100]}"
        for file, number, line in texts()
        if pattern.search(line) and not any(name in line for name in FOREIGN)
    ]
    assert not found, f"{len(found)} lines; write {BANNED[word]}:\n" + "\n".join(found[:20])
