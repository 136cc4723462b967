import shutil
from pathlib import Path

import pytest

from shards.__main__ import main as make_shards


@pytest.fixture
def bright_only(labeled_shards: Path, tmp_path: Path) -> Path:
    """Pack only class 1 of `labeled_shards`, which has the number 0 here."""
    shutil.copytree(labeled_shards.parent / "images" / "class_1", tmp_path / "images" / "class_1")
    arguments = ["pack", str(tmp_path / "images"), str(tmp_path / "bright"), "--workers", "1", "--format", "folders"]
    assert make_shards(arguments) == 0
    return tmp_path / "bright"
