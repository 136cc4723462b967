"""The head: its published names, weight normalization against torch's own, and the precision of its logits."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from dino_fast.model.head import DinoHead, HeadRecipe, WeightNormLinear

SMALL = HeadRecipe(out_dim=96, hidden_dim=32, bottleneck_dim=16)


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        (replace(SMALL, layers=1), ["mlp.weight", "mlp.bias"]),
        (replace(SMALL, layers=2), [f"mlp.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")]),
        (SMALL, [f"mlp.{i}.{p}" for i in (0, 2, 4) for p in ("weight", "bias")]),
        (
            replace(SMALL, batch_norm=True),
            [f"mlp.{i}.{p}" for i in (0, 1, 3, 4, 6) for p in ("weight", "bias")]
            + [f"mlp.{i}.{b}" for i in (1, 4) for b in ("running_mean", "running_var", "num_batches_tracked")],
        ),
    ],
)
def test_the_names_are_the_published_ones(recipe: HeadRecipe, names: list[str]) -> None:
    last = ["last_layer.weight_g", "last_layer.weight_v"]
    assert sorted(DinoHead(24, recipe).state_dict()) == sorted(names + last)


@pytest.mark.parametrize("learn", [False, True])
def test_weight_norm_equals_torchs_own(learn: bool) -> None:
    mine = WeightNormLinear(7, 11, learn_lengths=learn).double()
    torch.nn.init.uniform_(mine.weight_g, 0.5, 2)
    theirs = weight_norm(nn.Linear(7, 11, bias=False).double())
    g, v = theirs.parametrizations.weight.original0, theirs.parametrizations.weight.original1
    with torch.no_grad():
        g.copy_(mine.weight_g)
        v.copy_(mine.weight_v)
    x = torch.randn(5, 7, dtype=torch.float64)
    target = torch.randn(5, 11, dtype=torch.float64)
    for layer in (mine, theirs):
        F.mse_loss(layer(x), target).backward()
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(mine.weight_v.grad, v.grad, rtol=1e-10, atol=1e-14)
    if learn:
        torch.testing.assert_close(mine.weight_g.grad, g.grad, rtol=1e-10, atol=1e-14)
    else:
        assert mine.weight_g.grad is None


def test_the_head_is_mlp_then_cosines() -> None:
    head = DinoHead(24, replace(SMALL, layers=2)).double()
    x = torch.randn(6, 24, dtype=torch.float64)
    assert isinstance(head.mlp, nn.Sequential)
    z = head.mlp[2](F.gelu(head.mlp[0](x)))
    expected = torch.cosine_similarity(z[:, None], head.last_layer.weight_v[None], dim=-1)
    torch.testing.assert_close(head(x), expected, rtol=1e-10, atol=1e-12)


def test_initial_weights_are_drawn_as_published() -> None:
    torch.manual_seed(0)
    head = DinoHead(512, HeadRecipe(out_dim=512, hidden_dim=512, layers=1))
    assert isinstance(head.mlp, nn.Linear)
    assert head.mlp.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert head.mlp.bias.abs().max() == 0
    assert head.last_layer.weight_v.abs().max().item() == pytest.approx(256**-0.5, rel=0.01)
    assert (head.last_layer.weight_g == 1).all()
    assert not head.last_layer.weight_g.requires_grad


@pytest.mark.parametrize(
    ("autocast", "logits", "tolerance"), [(torch.bfloat16, torch.float32, 0.02), (torch.float16, torch.float16, 0.003)]
)
def test_logits_under_autocast(autocast: torch.dtype, logits: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(1)
    head = DinoHead(24, SMALL)
    x = torch.randn(64, 24)
    with torch.autocast("cpu", dtype=autocast):
        out = head(x)
    assert out.dtype == logits
    torch.testing.assert_close(out.float(), head(x), rtol=0, atol=tolerance)


def test_bfloat16_logits_are_not_rounded_to_bfloat16() -> None:
    """Given the bottleneck's features, a bfloat16 run has the logits of a float32 run to the last bits."""
    layer = WeightNormLinear(16, 96, learn_lengths=False)
    x = F.normalize(torch.randn(64, 16), dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    torch.testing.assert_close(out, layer(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_zero_feature_has_zero_logits(dtype: torch.dtype) -> None:
    head = DinoHead(4, replace(SMALL, layers=1))
    nn.init.zeros_(head.mlp.weight)  # type: ignore[arg-type]
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        assert (head(torch.ones(2, 4)) == 0).all()
