"""Modules with Triton kernels as tests import them: interpreted where there is no GPU, else compiled."""

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch


def kernels(name: str) -> ModuleType:
    """Triton decides when a kernel is defined whether it will be interpreted. Skips where there is no Triton."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
            _mend_interpreter()
        return importlib.import_module(name)


def _mend_interpreter() -> None:
    """Triton 3.6 makes a number of an array [1], which numpy 2.4 and later refuse. Newer ones do what is done here."""
    from triton.runtime import interpreter

    before = interpreter._patch_lang_tensor
    if getattr(before, "mended", False):
        return

    def after(tensor: Any, scope: Any) -> None:
        before(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    after.mended = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = after
