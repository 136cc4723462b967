"""Memory is used again when its last tensor is gone, and not before."""

import gc

import pytest
import torch

from pipelines.buffers import BufferPool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_memory_is_used_again_when_its_last_view_is_gone(dtype: torch.dtype) -> None:
    buffers = BufferPool(spare=2)
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
    buffers = BufferPool(spare=2)
    lent = [buffers.empty((1 << 10,), torch.float32) for _ in range(5)]
    places = {tensor.data_ptr() for tensor in lent}
    del lent
    gc.collect()
    assert sum(map(len, buffers._free.values())) == 2
    assert {buffers.empty((1 << 10,), torch.float32).data_ptr()} <= places


def test_a_tensor_outlives_its_pool() -> None:
    tensor = BufferPool(spare=1).empty((3,), torch.float32).fill_(5)
    gc.collect()
    assert tensor.tolist() == [5, 5, 5]
