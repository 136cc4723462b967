"""Memory is used again when nobody looks into it, and not before."""

import gc

import pytest
import torch

from pipelines.buffers import Buffers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_memory_comes_back_with_the_last_view_of_it(dtype: torch.dtype) -> None:
    buffers = Buffers(spare=2)
    first = buffers.empty((4, 5, 3), dtype)
    assert first.shape == (4, 5, 3)
    assert first.dtype == dtype
    place, corner = first.data_ptr(), first.fill_(7)[1:, 2]
    del first
    other = buffers.empty((4, 5, 3), dtype).fill_(1)
    assert other.data_ptr() != place
    assert (corner == 7).all()
    del corner
    assert buffers.empty((5, 4, 3), dtype).data_ptr() == place


def test_no_more_than_the_spare_blocks_are_kept() -> None:
    buffers = Buffers(spare=2)
    lent = [buffers.empty((1 << 10,), torch.float32) for _ in range(5)]
    places = {tensor.data_ptr() for tensor in lent}
    del lent
    gc.collect()
    assert sum(map(len, buffers._free.values())) == 2
    assert {buffers.empty((1 << 10,), torch.float32).data_ptr()} <= places


def test_what_is_lent_outlives_the_lender() -> None:
    tensor = Buffers(spare=1).empty((3,), torch.float32).fill_(5)
    gc.collect()
    assert tensor.tolist() == [5, 5, 5]
