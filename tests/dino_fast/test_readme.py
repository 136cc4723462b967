"""The Python code that the documentation tells its readers to run."""

import re
from pathlib import Path

import torch

from dino_fast.evaluate.trained_backbone import load_backbone
from tests.dino_fast.conftest import ROOT


def test_the_backbone_comes_out_of_a_checkpoint_as_the_documentation_says(train_here, tmp_path: Path, monkeypatch):
    output = tmp_path / "runs" / "own_photos"
    assert train_here(output, "--max_steps", "2") == 0
    snippet, of_timm = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "evaluation.md").read_text(), flags=re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(snippet, names)
    ours = load_backbone(output, "teacher").network
    images = torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(names["backbone"](images), ours.eval()(images))
    # The lines for a model of timm, after the weights of its run.
    flags = (
        "--max_steps",
        "2",
        "--backbone",
        "timm/test_vit2",
        "--crops.global_size",
        "48",
        "--crops.local_size",
        "32",
    )
    assert train_here(tmp_path / "timm", *flags) == 0
    theirs = load_backbone(tmp_path / "timm", "teacher").network
    names["weights"] = theirs.state_dict()
    exec(of_timm.replace("NAME", "test_vit2"), names)
    assert all(torch.equal(value, names["weights"][name]) for name, value in names["backbone"].state_dict().items())
