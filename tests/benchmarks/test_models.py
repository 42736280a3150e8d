"""Resamplers of released models compared as they are published, converted and folded."""

import pytest
import torch

from benchmarks import fold, measure, models


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kosmos-2", "aria"])
@torch.no_grad()
def test_all_forms_agree_and_folding_needs_less_memory(name):
    modules = models.modules(name, torch.float32)
    call = models.arguments(name, 1, torch.float32)
    truth = models.features(modules["published"](*call)).double()
    for form in models.FORMS:
        found = models.features(modules[form](*call))
        # fp32: sums of some thousand products, in other orders.
        assert measure.relative_error(found, truth) < 2e-6
    images = models.MODELS[name].images
    published, folded = (fold.peak_mib(form, images, name) for form in ("published", "keys"))
    assert folded <= {"kosmos-2": 0.65, "aria": 0.5}[name] * published


def test_multiply_adds_are_counted():
    linear = torch.nn.Linear(8, 4)
    assert models.multiply_adds(linear, (torch.ones(3, 8),)) == 3 * 8 * 4
