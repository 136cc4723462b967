import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch

from dino_fast import checkpoint
from shards.errors import UserError


def state(value: float) -> dict:
    return {"model": {"teacher": {"weight": torch.full((3,), value)}}, "recipe": {"seed": 1}}


def test_what_is_saved_is_loaded(tmp_path: Path):
    path = checkpoint.save(tmp_path / "run", 7, state(2.0))
    assert path.name.startswith("step-00000007-")
    loaded = checkpoint.load(path)
    assert loaded["step"] == 7
    assert loaded["recipe"] == {"seed": 1}
    assert torch.equal(loaded["model"]["teacher"]["weight"], torch.full((3,), 2.0))
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == [path.name]


def test_the_newest_good_checkpoint_is_found_and_a_damaged_one_passed_over(tmp_path: Path):
    assert checkpoint.load_newest(tmp_path) is None
    paths = [checkpoint.save(tmp_path, step, state(step)) for step in (5, 10, 100)]
    (tmp_path / ".writing-00000200.pt").write_bytes(b"half a checkpoint")
    found, damaged = checkpoint.load_newest(tmp_path)
    assert (found["step"], damaged) == (100, [])
    with open(paths[2], "r+b") as file:
        file.seek(200)
        file.write(b"\xff\x00\xff")
    found, damaged = checkpoint.load_newest(tmp_path)
    assert found["step"] == 10
    assert damaged == [paths[2]]
    for path in paths[:2]:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="all 3 checkpoints are damaged"):
        checkpoint.load_newest(tmp_path)


def test_pruning_keeps_the_newest_and_the_milestones(tmp_path: Path):
    for step in range(10, 101, 10):
        checkpoint.save(tmp_path, step, state(step))
    (tmp_path / ".writing-00000110.pt").write_bytes(b"")
    (tmp_path / "notes.pt").write_bytes(b"mine")
    checkpoint.prune(tmp_path, keep=2, keep_every=40)
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [40, 80, 90, 100]
    assert (tmp_path / "notes.pt").exists()
    assert not list(tmp_path.glob(".writing-*"))


class Malicious:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.parametrize("name", ["mine.pt", "step-00000001-0123456789abcdef.pt"])
def test_files_that_are_no_checkpoints_are_refused_and_run_nothing(tmp_path: Path, monkeypatch, name: str):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    writers = [
        lambda: path.write_bytes(pickle.dumps(Malicious(), protocol=2)),
        lambda: torch.save({"model": Malicious()}, path),
        lambda: torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}}, path),
        lambda: torch.save({"format": 1, "model": {"student": {}}}, path),
        lambda: path.write_bytes(b""),
        lambda: path.write_text("hello"),
    ]
    for write in writers:
        write()
        with pytest.raises(UserError, match=str(path)) as caught:
            checkpoint.load(path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()


def test_a_newer_format_and_a_missing_file_are_named(tmp_path: Path):
    torch.save({"format": 99, "step": 1, **state(0)}, tmp_path / "new.pt")
    with pytest.raises(UserError, match="newer dino-fast"):
        checkpoint.load(tmp_path / "new.pt")
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "none.pt")


def test_a_full_disk_leaves_the_previous_checkpoint_and_no_half_one(tmp_path: Path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        good = checkpoint.save(small, 1, state(1.0))
        big = {**state(2.0), "model": {"teacher": {"weight": torch.zeros(10**6)}}}
        with pytest.raises(UserError, match=r"step 2 could not be written .*Free some space"):
            checkpoint.save(small, 2, big)
        assert list(small.iterdir()) == [good]
        assert checkpoint.load_newest(small)[0]["step"] == 1
    finally:
        subprocess.run(["umount", str(small)], check=True)
