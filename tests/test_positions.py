import copy
import math
import pickle

import numpy as np
import pytest
import torch
from helpers import features, make

from visproj import fold, positions
from visproj.positions import (
    PositionCache,
    by_cell,
    check_grid,
    grid_of,
    position_axes,
    resize_position_table,
    sincos_position_table,
)


def upstream_table(dim, rows, columns):
    """The published fp32 recipe, one cell and one column at a time."""
    table = np.empty((rows * columns, dim), np.float32)
    omega = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float32) / (dim / 4.0))
    for i in range(rows):
        for j in range(columns):
            table[i * columns + j] = np.concatenate(
                [np.sin(j * omega), np.cos(j * omega), np.sin(i * omega), np.cos(i * omega)]
            )
    return torch.from_numpy(table)


@pytest.mark.parametrize("dim", [4, 64, 576, 1000])
@pytest.mark.parametrize("grid", [(1, 1), (16, 16), (3, 5), (24, 1)])
def test_table_is_the_published_one(dim, grid):
    # Upstream multiplies angles up to 23 in fp32: 23 * 2**-24 is an error of 1.4e-6.
    torch.testing.assert_close(
        sincos_position_table(dim, grid), upstream_table(dim, *grid), rtol=0, atol=3e-6
    )


def test_table_puts_the_width_first():
    table = sincos_position_table(8, (2, 3)).reshape(2, 3, 8)
    assert torch.equal(table[0, :, :4], table[1, :, :4])
    assert torch.equal(table[:, 0, 4:], table[:, 2, 4:])
    assert not torch.equal(table[0, 0, :4], table[0, 1, :4])


def test_table_where_new_floating_tensors_are_cast(monkeypatch):
    """As DeepSpeed's zero.Init does to what torch.arange and its like return."""
    wanted, arange = sincos_position_table(64, (16, 16)), torch.arange

    def cast(*args, **kwargs):
        made = arange(*args, **kwargs)
        return made.bfloat16() if made.is_floating_point() else made

    monkeypatch.setattr(torch, "arange", cast)
    assert torch.equal(sincos_position_table(64, (16, 16)), wanted)


@pytest.mark.parametrize("dim", [0, -4, 2, 6, 66])
def test_table_refuses_widths(dim):
    with pytest.raises(ValueError, match=f"divisible by 4, got {dim}"):
        sincos_position_table(dim)


def cubic_weights(source, target):
    """The matrix of 1-D bicubic resizing, a = -0.75, half-pixel centres, edges repeated."""
    a, weights = -0.75, torch.zeros(target, source, dtype=torch.float64)

    def kernel(t):
        t = abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            weights[i, min(max(tap, 0), source - 1)] += kernel(centre - tap)
    return weights


@pytest.mark.parametrize("target", [(24, 24), (32, 32), (8, 8), (24, 32), (1, 7), (16, 15)])
def test_resizing_is_separable_bicubic(target):
    table = sincos_position_table(64)
    by_row, by_column = cubic_weights(16, target[0]), cubic_weights(16, target[1])
    grid = table.double().reshape(16, 16, 64)
    wanted = torch.einsum("ip,jq,pqd->ijd", by_row, by_column, grid).reshape(-1, 64)
    got = resize_position_table(table, (16, 16), target)
    # 16 products of magnitude 1 summed in fp32.
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_resizing_computes_in_fp32_and_casts_back(dtype):
    table = sincos_position_table(16).to(dtype)
    got = resize_position_table(table, (16, 16), (5, 9))
    assert got.dtype == dtype
    assert torch.equal(got, resize_position_table(table.float(), (16, 16), (5, 9)).to(dtype))


def test_same_grid_is_the_table_itself():
    table = sincos_position_table(16, (3, 4))
    assert resize_position_table(table, (3, 4), (3, 4)) is table


def test_resizing_refuses_a_wrong_source():
    with pytest.raises(ValueError, match="256 rows, but a 15x17 grid has 255"):
        resize_position_table(sincos_position_table(16), (15, 17), (8, 8))


@pytest.mark.parametrize("grid", [(0, 3), (3,), (2, 2, 2), (-1, 4), (2.5, 2), (True, 4)])
def test_grid_refused(grid):
    with pytest.raises(ValueError, match="two positive integers"):
        check_grid(grid)


@pytest.mark.parametrize(
    ("tokens", "grid", "message"),
    [
        (255, None, "255 visual tokens"),
        (0, None, "0 visual tokens"),
        (768, None, "768 visual tokens"),
        (256, (24, 32), "24x32 has 768 cells, but there are 256"),
    ],
)
def test_grid_of_names_the_numbers(tokens, grid, message):
    with pytest.raises(ValueError, match=message):
        grid_of(tokens, grid)


def test_grid_of_accepts():
    assert grid_of(256, None) == (16, 16)
    assert grid_of(256, (8, 32)) == (8, 32)


class TestCache:
    def setup_method(self):
        self.table = torch.nn.Parameter(sincos_position_table(16), requires_grad=False)
        self.cache = PositionCache()

    def resize(self, target=(5, 7)):
        return self.cache.resize(self.table, (16, 16), target)

    def test_remembers(self):
        assert self.resize() is self.resize()

    def test_sees_an_in_place_change(self):
        before = self.resize()
        with torch.no_grad():
            self.table.mul_(2)
        torch.testing.assert_close(self.resize(), before * 2)

    def test_sees_new_data(self):
        before = self.resize()
        self.table.data = self.table.data * 3
        torch.testing.assert_close(self.resize(), before * 3)

    def test_sees_another_tensor(self):
        before = self.resize()
        self.table = torch.nn.Parameter(self.table.data * 2, requires_grad=False)
        torch.testing.assert_close(self.resize(), before * 2)

    def test_an_entry_of_inference_mode_serves_training(self):
        with torch.inference_mode():
            self.resize()
        weight = torch.ones(16, requires_grad=True)
        (self.resize() * weight).sum().backward()
        torch.testing.assert_close(weight.grad, self.resize().sum(0))

    def test_a_trained_table_gets_its_gradient(self):
        self.table.requires_grad_(True)
        self.resize().sum().backward()
        # Each resized cell distributes a total weight of 1.
        torch.testing.assert_close(self.table.grad.sum(), torch.tensor(35.0 * 16))

    def test_stays_small(self):
        for side in range(1, 80):
            self.resize((side, 2))
        assert len(self.cache._entries) <= PositionCache._CAPACITY

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
    def test_copies_are_empty(self, duplicate):
        self.resize()
        assert self.is_separable()
        copied = duplicate(self.cache)
        assert (copied._entries, copied._separable) == ({}, None)

    @pytest.mark.parametrize("real", [True, False])
    def test_nothing_is_kept_under_fake_tensors(self, real):
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            self.table = self.table if real else mode.from_tensor(self.table)
            self.resize()
            assert not self.is_separable()
        assert (self.cache._entries, self.cache._separable) == ({}, None)

    def is_separable(self):
        return self.cache.is_separable(self.table, (16, 16))

    def test_compares_a_separable_table_once(self, monkeypatch):
        compared, compare = [], positions.position_axes
        monkeypatch.setattr(
            positions, "position_axes", lambda *given: compared.append(given) or compare(*given)
        )
        assert self.is_separable()
        assert self.is_separable()
        self.cache.clear()
        assert self.is_separable()
        assert len(compared) == 2

    def test_sees_that_a_table_is_no_longer_separable(self):
        assert self.is_separable()
        with torch.no_grad():
            self.table[20, 3] += 1
        assert not self.is_separable()
        self.table.data = sincos_position_table(16)
        assert self.is_separable()
        self.table = torch.nn.Parameter(torch.randn(256, 16), requires_grad=False)
        assert not self.is_separable()

    def test_takes_a_trained_table_for_one_that_is_not_separable(self):
        self.table.requires_grad_(True)
        assert not self.is_separable()


def test_axes_of_a_table():
    table = sincos_position_table(16, (3, 5))
    rows, columns = position_axes(table, (3, 5))
    assert torch.equal(by_cell(rows, columns).flatten(0, 1), table)
    table[7, 3] += 1
    assert position_axes(table, (3, 5)) is None


@pytest.mark.parametrize("separable", [True, False])
@torch.no_grad()
def test_folded_tables(separable):
    """A loaded table that is not one vector per row beside one per column keeps its full form."""
    projector = make("perceiver", query_grid=(3, 3), num_heads=4, has_cls=False)
    if not separable:
        projector.pos_embed[4, 3] += 1
    folded = fold(projector)
    assert folded.config["separable"] == separable
    assert hasattr(folded, "rows") == separable
    for grid in ((3, 3), (4, 6), (1, 2)):
        x = features(2, grid[0] * grid[1])
        wanted = projector(x, grid=grid)
        # Tables are resized in fp32, before a product or after it.
        bound = 1e-12 if grid == (3, 3) else 1e-6
        assert (folded(x, grid=grid) - wanted).abs().max() <= bound * wanted.abs().max()
