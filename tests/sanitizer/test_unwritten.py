import pytest
import torch
from sanitizer.unwritten import PATTERNS, fill, guarded, intact, is_unwritten


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)], ids=str)
def test_guarded(shape):
    tensor = torch.randn(shape)
    view = guarded(tensor, before=4)
    assert torch.equal(view, tensor)
    assert intact(view)
    last = view.untyped_storage().nbytes() // 4 - 1
    view.as_strided((1,), (1,), last).zero_()
    assert not intact(view)


@pytest.mark.parametrize("dtype", PATTERNS, ids=str)
def test_pattern_is_no_number(dtype):
    tensor = fill(torch.empty(3, dtype=dtype))
    assert is_unwritten(tensor).all()
    assert not dtype.is_floating_point or tensor.isnan().all()
    assert not is_unwritten(torch.full((1,), torch.nan).to(dtype)).any()
