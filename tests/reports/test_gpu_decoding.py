"""How DALI is asked to decode on a GPU, and how its errors are understood. No GPU is needed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines.crops import CropRecipe
from pipelines.decoder import DecodeError

decode_dali = pytest.importorskip("pipelines.decode_dali", reason="DALI is not installed")


class Failing:
    """A pipeline of DALI's that ends with an error."""

    def __init__(self, text: str) -> None:
        self.text = text

    def run(self, stream: Any) -> None:
        raise RuntimeError(self.text)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Error in thread 0: CUDA runtime API error cudaErrorIllegalAddress (700)", RuntimeError),
        ("CUDA driver API error CUDA_ERROR_OUT_OF_MEMORY (2): out of memory", RuntimeError),
        ("Critical error in pipeline: nvJPEG error 3: encountered: truncated", DecodeError),
    ],
)
def test_an_error_of_cuda_is_no_bad_image(text: str, kind: type[Exception]):
    """NVIDIA/DALI #2019, #306: one word for an image that is damaged and for a GPU that has failed."""
    decoder = decode_dali.DaliDecoder(CropRecipe(32, local_size=24, locals=1), 1, torch.device("cpu"), threads=1)
    with pytest.raises(kind) as caught:
        decoder._run(Failing(text))
    assert type(caught.value) is kind


def test_a_gpu_interpolates_colors_as_a_cpu_does(monkeypatch: pytest.MonkeyPatch):
    """NVIDIA/DALI: the same JPEG file has other pixels on a GPU, unless it is asked for fancy upsampling."""
    asked: list[dict[str, Any]] = []
    node = SimpleNamespace(gpu=lambda: None)
    decoders = SimpleNamespace(image=lambda encoded, **options: asked.append(options) or node)
    monkeypatch.setattr(decode_dali, "fn", SimpleNamespace(decoders=decoders))
    decode_dali._decode_node(None, True, decode_dali.HardwareDecoder(0.5, 0, 0))
    decode_dali._decode_node(None, True, None)
    on_gpu, on_cpu = asked
    assert (on_gpu["device"], on_gpu["jpeg_fancy_upsampling"]) == ("mixed", True)
    assert on_cpu["device"] == "cpu"
    assert all(options["adjust_orientation"] is False for options in asked)
