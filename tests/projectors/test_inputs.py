"""What the projectors refuse: each message names the argument, what was got and what was wanted."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import VIS_CONFIG, make

from visproj import LinearProjector, PerceiverProjector, ViTProjector, build_projector, fold
from visproj.errors import VisprojError


def config(**changes):
    return SimpleNamespace(**(vars(VIS_CONFIG) | changes))


def without(field):
    return SimpleNamespace(**{k: v for k, v in vars(VIS_CONFIG).items() if k != field})


@pytest.mark.parametrize("kind", ["baseline", "vit", "perceiver"])
@pytest.mark.parametrize("width", [64.0, "64", None, True, [64]], ids=repr)
def test_lang_dim_of_another_type(kind, width):
    with pytest.raises(TypeError, match=r"^lang_dim must be an int, got "):
        build_projector(kind, VIS_CONFIG, width)


@pytest.mark.parametrize("kind", ["baseline", "vit", "perceiver"])
@pytest.mark.parametrize("width", [0, -4])
def test_lang_dim_out_of_range(kind, width):
    with pytest.raises(ValueError, match=f"^lang_dim must be positive, got {width}"):
        build_projector(kind, VIS_CONFIG, width)


def test_integers_of_numpy_are_integers():
    assert LinearProjector(np.int64(32), np.int32(8)).vis_dim == 32
    projector = PerceiverProjector(32, np.int64(64), query_grid=np.array([2, 3]), num_heads=2)
    assert projector.query_grid == (2, 3)
    assert projector.embed_dim == 64


@pytest.mark.parametrize("width", ["32", 32.0, None, True, SimpleNamespace(), {"hidden_size": 32}])
def test_vis_config_without_a_width(width):
    for kind in (LinearProjector, PerceiverProjector):
        with pytest.raises(
            TypeError, match="vis_config must be a width or have an int hidden_size"
        ):
            kind(width, 64)


@pytest.mark.parametrize("field", vars(VIS_CONFIG))
def test_a_field_of_the_config_is_missing(field):
    with pytest.raises(TypeError, match=rf"vis_config \(SimpleNamespace\) lacks {field}"):
        ViTProjector(without(field), 64)


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("hidden_size", None, TypeError, "int hidden_size"),
        ("hidden_size", 0, ValueError, "vision width must be positive, got 0"),
        ("intermediate_size", 48.0, TypeError, "intermediate_size must be an int, got 48.0"),
        ("intermediate_size", -1, ValueError, "intermediate_size must be positive, got -1"),
        ("num_attention_heads", None, TypeError, "num_heads must be an int, got None"),
        ("num_attention_heads", 5, ValueError, "5 heads do not divide a width of 32"),
        ("hidden_act", None, ValueError, "hidden_act must be one of .*, got None"),
        ("hidden_act", ["gelu"], ValueError, "hidden_act must be one of .*, got .'gelu'."),
        ("layer_norm_eps", "1e-5", TypeError, "layer_norm_eps must be a number, got '1e-5'"),
        ("layer_norm_eps", -1e-5, ValueError, "layer_norm_eps must lie between 0 and inf"),
        ("layer_norm_eps", float("nan"), ValueError, "layer_norm_eps must lie .*, got nan"),
        ("attention_dropout", None, TypeError, "attention_dropout must be a number, got None"),
        ("attention_dropout", 1.5, ValueError, "attention_dropout must lie between 0 and 1"),
    ],
)
def test_a_field_of_the_config_is_unusable(field, value, error, message):
    with pytest.raises(error, match=message):
        ViTProjector(config(**{field: value}), 64)


GRIDS = [
    (0, 4), (-2, -2), (4,), (2, 2, 2), 4, None, "22", ("2", "2"), (2.5, 2), (True, 4), (None, 2),
    (float("nan"), 2), (float("inf"), 2), torch.zeros(2, 2), {2: 2},
]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_query_grid(grid):
    with pytest.raises(
        VisprojError, match=r"^grid must be two positive integers \(rows, columns\)"
    ):
        PerceiverProjector(32, 64, query_grid=grid)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": 0}, ValueError, "0 heads do not divide a width of 64"),
        ({"num_heads": -2}, ValueError, "-2 heads do not divide"),
        ({"num_heads": 2.0}, TypeError, "num_heads must be an int, got 2.0"),
        ({"num_heads": True}, TypeError, "num_heads must be an int, got True"),
        ({"has_cls": "no"}, TypeError, "has_cls must be a bool, got 'no'"),
        ({"has_cls": None}, TypeError, "has_cls must be a bool, got None"),
    ],
)
def test_options_of_a_perceiver(options, error, message):
    with pytest.raises(error, match=message):
        PerceiverProjector(32, 64, **options)


def test_a_width_that_no_position_table_has():
    with pytest.raises(VisprojError, match="width divisible by 4, got 66"):
        PerceiverProjector(32, 66)


@pytest.fixture(params=["baseline", "vit", "perceiver"])
def kind(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["projector", "folded"])
def projector(request, kind):
    options = {"query_grid": (2, 2), "num_heads": 2} if kind == "perceiver" else {}
    projector = make(kind, 64, torch.float32, **options)
    return fold(projector) if request.param else projector


X = torch.zeros(2, 5, 32)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (None, TypeError, "visual features must be a tensor, got NoneType"),
        (X.numpy(), TypeError, "visual features must be a tensor, got ndarray"),
        (X.tolist(), TypeError, "visual features must be a tensor, got list"),
        (X.long(), TypeError, "visual features must be floating point, got torch.int64"),
        (X.bool(), TypeError, "visual features must be floating point, got torch.bool"),
        (X.cfloat(), TypeError, "visual features must be floating point, got torch.complex64"),
        (
            X.to_sparse(),
            TypeError,
            "visual features must be a dense tensor, got a torch.sparse_coo",
        ),
        (X[0, 0], ValueError, r"visual features must be \[..., tokens, 32\], got shape \[32\]"),
        (X[..., 1:], ValueError, r"must be \[..., tokens, 32\], got shape \[2, 5, 31\]"),
        (X.half(), TypeError, "must have one dtype, got .*torch.float16"),
        (X.to("meta"), ValueError, "must be on one device, got .*meta"),
    ],
    ids=lambda value: None if isinstance(value, type) else str(value)[:30],
)
def test_features(projector, x, error, message):
    with pytest.raises(error, match=message):
        projector(x)


@pytest.mark.parametrize("kind", ["perceiver"], indirect=True)
@pytest.mark.parametrize("grid", [g for g in GRIDS if g is not None], ids=repr)
def test_grid_of_the_features(projector, grid):
    with pytest.raises(VisprojError, match=r"^grid must be two positive integers"):
        projector(X, grid=grid)


@pytest.mark.parametrize("kind", ["perceiver"], indirect=True)
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (True, TypeError, "must be a tensor, got bool"),
        ([[0]], TypeError, "must be a tensor, got list"),
        (np.zeros((4, 4)), TypeError, "must be a tensor, got ndarray"),
        (torch.zeros(4, 4).long(), TypeError, "must be bool.*, got torch.int64"),
        (torch.zeros(3, 4, dtype=torch.bool), ValueError, r"must be \[.*, got \[3, 4\]"),
        (torch.tensor(True), ValueError, r"must be \[.*, got \[\]"),
    ],
    ids=["bool", "list", "ndarray", "int64", "shape", "scalar"],
)
@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_masks(projector, name, mask, error, message):
    with pytest.raises(error, match=f"^{name} {message}"):
        projector(X, **{name: mask})
