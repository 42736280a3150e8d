"""What position tables refuse."""

import pytest
import torch

from visproj.positions import grid_of, resize_position_table, sincos_position_table


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        (None, TypeError, "table must be a floating-point tensor, got NoneType"),
        (torch.zeros(4, 8).numpy(), TypeError, "must be a floating-point tensor, got ndarray"),
        (torch.zeros(4, 8).long(), TypeError, "floating-point tensor, got torch.int64"),
        (torch.zeros(4), ValueError, r"table must be \[rows \* columns, D\], got shape \[4\]"),
        (torch.zeros(4, 8, 1), ValueError, r"got shape \[4, 8, 1\]"),
        (torch.zeros(4, 0), ValueError, r"got shape \[4, 0\]"),
        (torch.tensor(0.0), ValueError, r"got shape \[\]"),
    ],
    ids=lambda value: None if isinstance(value, type) else str(value)[:30],
)
def test_table_refused(table, error, message):
    with pytest.raises(error, match=message):
        resize_position_table(table, (2, 2), (3, 3))


@pytest.mark.parametrize("grid", [None, 4, (2,), (float("inf"), 2), ("2", "2")], ids=repr)
@pytest.mark.parametrize("which", ["source", "target"])
def test_a_grid_of_a_resize_refused(which, grid):
    grids = {"source": (2, 2), "target": (2, 2), which: grid}
    with pytest.raises(ValueError, match="grid must be two positive integers"):
        resize_position_table(torch.zeros(4, 8), **grids)


def test_a_list_is_the_same_grid():
    table = torch.zeros(4, 8)
    assert resize_position_table(table, [2, 2], (2, 2)) is table


@pytest.mark.parametrize("dim", [0, -4, 6, 8.0, "8", None])
def test_width_of_a_table_refused(dim):
    with pytest.raises(ValueError, match=f"width divisible by 4, got {dim!r}"):
        sincos_position_table(dim, (2, 2))


def test_no_tokens_lie_on_no_grid():
    for grid in (None, (2, 2)):
        with pytest.raises(ValueError, match="0 visual tokens"):
            grid_of(0, grid)
