"""The version of this program, for all its commands. It is written in pyproject.toml alone."""

import re
from importlib import metadata
from pathlib import Path

_PACKAGE = "dino-fast"  # as pip knows it
_PROJECT_FILE = Path(__file__).resolve().parents[1] / "pyproject.toml"  # where the source is


def version() -> str:
    """Return the version of the installed package, or that of the source, or "unknown" where neither is there."""
    try:
        return metadata.version(_PACKAGE)
    except metadata.PackageNotFoundError:
        return _read_version(_PROJECT_FILE) or "unknown"


def _read_version(project_file: Path) -> str | None:
    """Return the version in a pyproject.toml of this package, or None. Python 3.10 has no parser for such files."""
    try:
        text = project_file.read_text(encoding="utf-8")
    except OSError:
        return None
    if f'name = "{_PACKAGE}"' not in text:
        return None
    match = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    return match[1] if match else None
