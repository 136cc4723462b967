"""Files of strangers execute nothing: each of these, if what it holds were executed, would leave a marker behind.

They go through the commands and functions that users call, which end in one line of error, or pass over what they do
not want.
"""

import argparse
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dino_fast import checkpoint
from dino_fast.__main__ import main as dino_fast
from dino_fast.model.head import HeadRecipe
from dino_fast.model.student_teacher import build_student_teacher
from dino_fast.run.initial_weights import load_initial_weights
from dino_fast.step.loss import LossRecipe
from dino_fast.step.optimizers import OptimRecipe, build_optimizer
from dino_fast.step.train_step import TrainStep
from dino_fast.weights import weight_files
from shards.__main__ import main as make_shards
from shards.errors import UserError
from shards.index import ShardIndex
from tests.shards.archives import tar_of
from tests.shards.manifests import forge, sealed


class Weapon:
    """What a pickle of it has executed when it is read: `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """What must not be there in the end."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "something was executed"


def weapons(marker: Path) -> dict[str, Any]:
    """Objects whose reading leaves the marker in different ways."""
    return {
        "system": Weapon(os.system, f"touch {marker}"),
        "exec": Weapon(exec, f"import pathlib; pathlib.Path({str(marker)!r}).touch()"),
        "library": Weapon(shutil.copyfile, __file__, str(marker)),
        "in settings": argparse.Namespace(hook=Weapon(os.system, f"touch {marker}")),
    }


def test_the_weapons_are_loaded(tmp_path: Path) -> None:
    """Read by pickle itself, each of them leaves the marker: the other tests can fail."""
    marker = tmp_path / "executed"
    for name, weapon in weapons(marker).items():
        pickle.loads(pickle.dumps(weapon))
        assert marker.exists(), name
        marker.unlink()


# ---- Checkpoints and .pth files


def zipped(weapon: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save({"format": 1, "step": 1, "student": weapon, "model": {"teacher": weapon}}, buffer)
    return buffer.getvalue()


def legacy(weapon: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save({"conv1.weight": torch.zeros(1), "x": weapon}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def raw(weapon: Any) -> bytes:
    return pickle.dumps(weapon, protocol=2)


def newest_protocol(weapon: Any) -> bytes:
    return pickle.dumps({"teacher": weapon})


def scripted(weapon: Any) -> bytes:
    """With the parts of a TorchScript archive, which torch.load would hand to another reader."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"archive/{name}", pickle.dumps(weapon, protocol=2))
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


WRITERS = (zipped, legacy, raw, newest_protocol, scripted)


def a_step() -> TrainStep:
    student, teacher = build_student_teacher("resnet18", HeadRecipe(out_dim=8, hidden_dim=8, bottleneck_dim=8))
    return TrainStep(student, teacher, build_optimizer(OptimRecipe(name="sgd"), student), LossRecipe())


def as_checkpoint(folder: Path, data: bytes) -> Path:
    """The bytes under the name that vouches for them."""
    folder.mkdir(exist_ok=True)
    path = folder / f"step-00000009-{hashlib.sha256(data).hexdigest()[:16]}.pt"
    path.write_bytes(data)
    return path


def one_line(text: str) -> str:
    (line,) = text.strip().splitlines()
    assert "Traceback" not in line
    return line


@pytest.mark.parametrize("write", WRITERS)
def test_checkpoints(tmp_path: Path, marker: Path, write: Callable[[Any], bytes]) -> None:
    step = a_step()
    for name, weapon in weapons(marker).items():
        data = write(weapon)
        foreign = tmp_path / "foreign.pth"
        foreign.write_bytes(data)
        run = tmp_path / name
        ours = as_checkpoint(run, data)
        for read, path in (
            (checkpoint.load, foreign), (checkpoint.load, ours), (checkpoint.load_newest, run),
            (lambda path: load_initial_weights(step, path), foreign),
            (lambda path: load_initial_weights(step, path), ours),
            (lambda path: load_initial_weights(step, path), run),
        ):  # fmt: skip
            with pytest.raises(UserError, match=str(path)) as caught:
                read(path)
            one_line(str(caught.value))
            assert not marker.exists(), (name, path)


def test_what_a_foreign_file_asks_for_is_named(tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "dino.pth"
    path.write_bytes(zipped(Weapon(os.system, f"touch {marker}")))
    with pytest.raises(UserError, match=r"dino.pth holds posix.system, which is .* was not executed") as caught:
        load_initial_weights(a_step(), path)
    assert "weights_only" not in str(caught.value)  # torch's advice, to switch it off, is none to pass on


def test_settings_that_are_passed_over_do_not_come_to_life(tmp_path: Path) -> None:
    allowed = set(torch.serialization.get_safe_globals())
    settings = {"args": argparse.Namespace(x=1), "path": PosixPath("/x"), "lr": np.float64(3), "a": torch.ones(2)}
    torch.save(settings, tmp_path / "settings.pth")
    read = weight_files._load(tmp_path / "settings.pth")
    assert {type(read[name]) for name in ("args", "path", "lr")} == {weight_files._Ignored}
    assert [vars(read[name]) for name in ("args", "path", "lr")] == [{}] * 3
    assert torch.equal(read["a"], torch.ones(2))
    assert set(torch.serialization.get_safe_globals()) == allowed  # and are allowed nowhere else


def test_the_commands_on_malicious_checkpoints(
    tmp_path: Path, marker: Path, labeled_shards: Path, train_here, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--train", str(labeled_shards), "--val", str(labeled_shards)]
    for weapon in weapons(marker).values():
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        path = as_checkpoint(tmp_path / "run", zipped(weapon))
        for what in (path, path.parent):
            assert dino_fast(["knn", "--checkpoint", str(what), *data]) == 1
            assert str(path) in one_line(capsys.readouterr().err)
        for run, *flags in ((path.parent,), (tmp_path / "fresh", "--init_from", str(path))):  # resumed, begun from it
            assert train_here(run, *flags) == 1
            assert str(path) in one_line(capsys.readouterr().err)
        assert not marker.exists()


# ---- Recipes


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:os.system ['touch {marker}']",
        "output: !!python/object/apply:os.system ['touch {marker}']",
        "!!python/object/apply:builtins.exec [\"open('{marker}', 'w')\"]",
        "optim: !!python/object/new:malice.Malice {{}}",
        "optim: !!python/object:malice.Malice {{lr: 3}}",
        "optim: {{name: !!python/name:malice.Malice ''}}",
        "data: {{train: !!python/module:malice ''}}",
        "!!python/object/apply:malice.Malice []: 3",
        "seed: malice.Malice",
        "class_path: malice.Malice",
        "optim: {{class_path: malice.Malice}}",
        "optim: malice.Malice",
        "data: malice.Malice",
    ],
)
def test_recipes(
    tmp_path: Path, marker: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "malice.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Malice: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "malice", raising=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.format(marker=marker) + "\n")
    assert dino_fast(["train", "--config", str(recipe), "--data.train", str(tmp_path / "none")]) == 2
    assert one_line(capsys.readouterr().err).startswith("dino-fast train: ")
    assert not marker.exists()


# ---- Shards


def images() -> dict[str, bytes]:
    files = {}
    for number in range(6):
        buffer = io.BytesIO()
        levels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(levels).save(buffer, "JPEG")
        files[f"{number:03d}.jpg"] = buffer.getvalue()
        files[f"{number:03d}.cls"] = b"%d" % (number % 2)
    return files


@pytest.fixture
def tainted(tmp_path: Path, marker: Path) -> Path:
    """A folder with a WebDataset tar in whose samples lie, beside images and labels, pickles by all their names."""
    weapon = Weapon(os.system, f"touch {marker}")
    buffer = io.BytesIO()
    np.save(buffer, np.array([weapon], object), allow_pickle=True)
    loads = {
        **{extension: pickle.dumps(weapon, 0) for extension in ("pyd", "pkl", "pickle", "pth", "pt", "txt", "id")},
        "npy": buffer.getvalue(),
        "py": f"open({str(marker)!r}, 'w')".encode(),
        "json": json.dumps({"__reduce__": f"os.system('touch {marker}')"}).encode(),
    }
    files = dict[str, bytes]()
    for name, data in images().items():
        files[name] = data
        if name.endswith(".cls"):
            files |= {name.replace("cls", extension): load for extension, load in loads.items()}
    (tmp_path / "tainted").mkdir()
    (tmp_path / "tainted" / "train-000000.tar").write_bytes(tar_of(files))
    return tmp_path / "tainted"


def test_pickles_in_samples_are_passed_over(
    tmp_path: Path, marker: Path, tainted: Path, train_here, capsys: pytest.CaptureFixture[str]
) -> None:
    """From indexing to a score: what is not asked for is not read."""
    jpegs = [data for name, data in images().items() if name.endswith(".jpg")]
    packed = tmp_path / "packed"
    assert make_shards(["index", str(tainted), "--workers", "1"]) == 0
    assert make_shards(["check", str(tainted), "--workers", "1"]) == 0
    with ShardIndex(tainted) as index:
        assert index.read(range(6)) == jpegs
        assert index.classes == ("0", "1")
    assert make_shards(["pack", str(tainted), str(packed), "--workers", "1"]) == 0
    with tarfile.open(packed / "train-000000.tar") as tar:
        assert {name.rpartition(".")[2] for name in tar.getnames()} == {"jpg", "cls"}
    for folder in (tainted, packed):
        run = tmp_path / f"run-{folder.name}"
        assert train_here(run, "--data.train", str(folder), "--batch_size", "4", "--max_steps", "1") == 0
        assert dino_fast(["knn", "--checkpoint", str(run), "--train", str(folder), "--val", str(folder)]) == 0
        assert not marker.exists()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["jpg", "cls", "json"])
def test_a_pickle_in_the_place_of_an_image_or_a_label(
    tmp_path: Path, marker: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"000.jpg": images()["000.jpg"], f"000.{name}": pickle.dumps(Weapon(os.system, f"touch {marker}"), 2)}
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").write_bytes(tar_of(files))
    for command in (["index", str(tmp_path / "tars")], ["pack", str(tmp_path / "tars"), str(tmp_path / "out")]):
        assert make_shards([*command, "--workers", "1"]) == 1
        assert "000" in one_line(capsys.readouterr().err)


@pytest.fixture
def finished(tmp_path: Path, labeled_shards: Path) -> Path:
    return shutil.copytree(labeled_shards, tmp_path / "finished")


def require_refused(folder: Path, word: str, train_here, capsys: pytest.CaptureFixture[str]) -> None:
    """By all that open shards, in a line with this word."""
    with pytest.raises(UserError, match=word) as caught:
        ShardIndex(folder)
    one_line(str(caught.value))
    capsys.readouterr()
    for command in ("check", "info"):
        assert make_shards([command, str(folder)]) == 1
        printed = capsys.readouterr()
        assert word in one_line(printed.err or printed.out.splitlines()[0])  # what `check` finds is its output
    assert train_here(folder.parent / "run", "--data.train", str(folder)) == 1
    assert word in one_line(capsys.readouterr().err)


def test_an_index_of_pickled_objects(
    finished: Path, marker: Path, train_here, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under a manifest that vouches for it."""
    weapon = Weapon(os.system, f"touch {marker}")
    for objects in (np.array([weapon] * 40, object), np.array([(weapon, 1)] * 40, [("shard", "O"), ("offset", "<u8")])):
        np.save(finished / "index.npy", objects, allow_pickle=True)
        forge(finished, index_sha256=hashlib.sha256((finished / "index.npy").read_bytes()).hexdigest())
        require_refused(finished, "index.npy", train_here, capsys)
    (finished / "index.npy").write_bytes(pickle.dumps(weapon))
    forge(finished, index_sha256=hashlib.sha256((finished / "index.npy").read_bytes()).hexdigest())
    require_refused(finished, "index.npy", train_here, capsys)


def test_a_manifest_that_is_no_json(
    finished: Path, marker: Path, train_here, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = json.loads((finished / "manifest.json").read_text())
    texts = [
        pickle.dumps(Weapon(os.system, f"touch {marker}")),
        pickle.dumps(Weapon(os.system, f"touch {marker}"), 0),
        f"!!python/object/apply:os.system ['touch {marker}']\n".encode(),
        f"__import__('os').system('touch {marker}')".encode(),
        sealed({**fields, "name": {"__class__": "os.system", "args": [f"touch {marker}"]}}).encode(),
    ]
    for text in texts:
        (finished / "manifest.json").write_bytes(text)
        require_refused(finished, "manifest.json", train_here, capsys)


def test_a_plan_and_parts_that_are_pickles(
    tmp_path: Path, marker: Path, tainted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an unfinished indexing would leave them. A part that is none is made anew."""
    weapon = pickle.dumps(Weapon(os.system, f"touch {marker}"))
    (tainted / ".parts").mkdir()
    (tainted / ".parts" / "000000.part").write_bytes(weapon)
    assert make_shards(["index", str(tainted), "--workers", "1"]) == 0
    for name in ("manifest.json", "index.npy", "rejected.csv", "duplicates.csv"):
        (tainted / name).unlink()
    (tainted / ".parts").mkdir(exist_ok=True)
    (tainted / ".parts" / "plan.json").write_bytes(weapon)
    capsys.readouterr()
    assert make_shards(["index", str(tainted), "--workers", "1"]) == 1
    assert "holds another packing, not finished" in one_line(capsys.readouterr().err)


def test_a_table_whose_columns_are_of_a_pickled_type(
    tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As pyarrow has read it before version 14.0.1."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    kind = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Weapon(os.system, f"touch {marker}"), 0),
    }
    schema = arrow.schema([arrow.field("image", arrow.binary(), metadata=kind)])
    table = arrow.table([[images()["000.jpg"]] * 3], schema=schema)
    parquet.write_table(table, tmp_path / "table.parquet")
    status = make_shards(["pack", str(tmp_path / "table.parquet"), str(tmp_path / "out"), "--workers", "1"])
    errors = capsys.readouterr().err
    assert (status, errors) == (0, "")
