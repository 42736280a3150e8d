"""Folded products and dropout: what tools that exchange Linears find, and what is refused."""

import pytest
import torch
from helpers import features, make, rms_error
from torch import nn

from visproj import fold
from visproj.errors import InputError

KINDS = ["baseline", "vit", "perceiver"]
# fp64 with one QR factorisation and products of up to 200 terms; 1e-13 was seen.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("kind", ["vit", "perceiver"])
def test_dropout_folds_in_eval_mode(kind):
    """It acts after the softmax, and never in eval mode; the folded form has none in either."""
    projector = make(kind)
    attention = projector.attn if kind == "perceiver" else projector.vis_layer.self_attn
    attention.dropout = 0.5
    with pytest.raises(ValueError, match="its dropout is active"):
        fold(projector)
    x = features(1, 257)
    folded = fold(projector.eval())
    torch.testing.assert_close(folded(x), projector(x), **EXACT)
    assert torch.equal(folded.train()(x), folded.eval()(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_folded_products_are_quantised(kind):
    """Tools that exchange Linears find the folded ones, and what they put there is called."""
    folded = fold(make(kind, dtype=torch.float32))
    quantised = torch.ao.quantization.quantize_dynamic(folded, {nn.Linear}, dtype=torch.qint8)
    x = features(2, 17, dtype=torch.float32)
    error = rms_error(quantised(x), folded(x))
    # 8 bits per product: 2**-8 of the largest of some 30 to 60 terms, in two or three products.
    assert 1e-3 < error < 0.1


def test_a_folded_weight_that_requires_gradients_is_refused():
    folded = fold(make("perceiver"))
    folded.kv.linear.weight.requires_grad_()
    with pytest.raises(RuntimeError, match="inference-only and has no gradients"):
        folded(features(1, 17))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_quantised_module_is_refused_by_name(tmp_path):
    projector = make("baseline", dtype=torch.float32).eval()
    folded = projector.fold()
    quantised = torch.ao.quantization.quantize_dynamic(folded)
    with pytest.raises(InputError, match="not a tensor: save before quantising"):
        quantised.save(tmp_path / "f")
    assert not (tmp_path / "f").exists()
    with pytest.warns(UserWarning, match="has changed since it was folded"):
        assert folded.is_stale(torch.ao.quantization.quantize_dynamic(projector))
