"""How far two trainings are apart."""

from itertools import combinations

import torch


def distance(got, want):
    """Largest relative difference of a loss, and of a weight relative to its tensor's largest."""
    assert got.state.keys() == want.state.keys()
    assert len(got.losses) == len(want.losses)
    losses = [abs(a - b) / abs(b) for a, b in zip(got.losses, want.losses, strict=True)]
    weights = [
        ((got.state[name] - value).abs().max() / value.abs().max()).item()
        for name, value in want.state.items()
    ]
    return largest(losses), largest(weights)


def largest(numbers):
    """NaN if any of them is, which ``max`` would pass over."""
    return torch.tensor(numbers).max().item()


def farthest(distances):
    """The largest of the losses' and the largest of the weights' differences."""
    return tuple(map(largest, zip(*distances, strict=True)))


def spread(results):
    """The largest distance between any two."""
    return farthest(distance(a, b) for a, b in combinations(results, 2))


def assert_within(found, allowed):
    """Fail unless the differences of losses and weights are what is allowed or less; NaN is not."""
    for what, difference, limit in zip(("losses", "weights"), found, allowed, strict=True):
        assert difference <= limit, f"{what} differ by {difference:.2g}, {limit:.2g} allowed"
