"""What the comparison of two trainings may not overlook."""

import math
from collections import Counter

import pytest
import torch
from distributed.comparison import assert_within, distance, farthest
from distributed.training import Result


def result(loss=1.0, weight=1.0):
    return Result([2.0, loss], {"first": torch.ones(2), "last": torch.tensor([weight])}, Counter())


def test_distance():
    found = farthest([distance(result(), result()), distance(result(1.1, 1.2), result())])
    assert found == pytest.approx((0.1, 0.2))
    assert_within(found, (0.11, 0.21))


@pytest.mark.parametrize("wrong", [1.1, math.nan, math.inf])
@pytest.mark.parametrize("what", ["loss", "weight"])
def test_one_number_is_enough(what, wrong):
    found = distance(result(**{what: wrong}), result())
    for order in ([found, (0.0, 0.0)], [(0.0, 0.0), found]):
        with pytest.raises(AssertionError, match=f"{what}.* differ by"):
            assert_within(farthest(order), (0.05, 0.05))


def test_other_weights_are_not_compared():
    other = result()
    other.state["more"] = other.state["last"]
    with pytest.raises(AssertionError):
        distance(other, result())
