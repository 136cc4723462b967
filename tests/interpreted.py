"""Modules with Triton kernels as tests import them: interpreted where there is no GPU, else compiled."""

import importlib
from types import ModuleType

import pytest
import torch


def kernels(name: str) -> ModuleType:
    """Triton decides when a kernel is defined whether it will be interpreted. Skips where there is no Triton."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        return importlib.import_module(name)
