"""The table of models that convert, against counts by hand."""

import math

import pytest
import torch

from visproj import fold
from visproj.folding.key_values import multiply_adds
from visproj.supported import MODELS, count, empty_config

# Tokens, width of the features and of the language model, queries, heads.
MINICPM = {"MiniCPM-V-2.5": (4096, 96), "MiniCPM-V-2.6": (3584, 64), "MiniCPM-V-4.5": (4096, 64)}


def triangular(rows, width):
    """A product with a triangular factor, by pieces that skip what is zero."""
    step = max(256, math.ceil(width / 8))
    return sum(rows * min(step, width - first) * (width - first) for first in range(0, width, step))


@pytest.mark.parametrize("name", MINICPM)
def test_minicpm_by_hand(name):
    lang_dim, queries = MINICPM[name]
    length, width, heads = 1024, 1152, lang_dim // 128
    counted = count(MODELS[name])
    attention = 2 * queries * length * lang_dim
    published = length * width * lang_dim + 2 * length * lang_dim**2 + attention
    assert counted.published == published + 3 * queries * lang_dim**2
    absorbed = 2 * heads * queries * length * width + queries * width * lang_dim
    tail = queries * lang_dim**2 + triangular(queries, lang_dim)
    assert counted.folded == absorbed + triangular(length, width) + tail
    assert counted.form == "absorbed"


def test_the_perceiver_by_hand():
    counted = count(MODELS["DeepSpeed-VisualChat"])
    length, width, lang_dim, queries = 256, 1024, 4096, 256
    keys = multiply_adds(
        "keys", length=length, width=width, lang_dim=lang_dim, queries=queries, heads=32
    )
    tail = queries * lang_dim**2 + triangular(queries, lang_dim)
    assert counted.folded == keys + triangular(length, width) + tail
    products = length * width * lang_dim + 2 * length * lang_dim**2 + 3 * queries * lang_dim**2
    assert counted.published == products + 2 * queries * length * lang_dim


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_fold_takes_the_form_that_is_counted(name):
    """Released widths; the configuration that was counted is the one that a fold writes."""
    model = MODELS[name]
    with torch.no_grad():
        folded = fold(model.build().eval())
    assert folded.config["form"] == count(model).form
    counted = empty_config(model)
    assert {key: type(value) for key, value in folded.config.items() if key != "digest"} == {
        key: type(value) for key, value in counted.items() if key in folded.config
    }
