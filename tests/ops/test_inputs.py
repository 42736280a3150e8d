"""What the operations refuse: the message names the argument, wherever it stands."""

import inspect

import pytest
import torch

from visproj import ops
from visproj.errors import InputError

C, D, N, L, H, d = 4, 8, 3, 5, 2, 4
PLACES = torch.zeros(2, L, dtype=torch.int64)


def arguments(name):
    """Arguments that the operation takes."""
    wide, vector = torch.ones(D, C), torch.ones(D)
    return {
        "linear_layer_norm": {
            "x": torch.ones(L, C), "weight": wide, "bias": vector, "gain": vector, "shift": vector,
        },
        "linear_norm_linear": {
            "x": torch.ones(2, L, C), "weight": wide, "bias": vector, "gain": vector,
            "shift": vector, "eps": 1e-5, "out_weight": torch.ones(N, D), "out_bias": torch.ones(N),
            "positions": torch.ones(L, D), "positioned": 1, "queries": torch.ones(5, D),
            "queried": 1,
        },
        "folded_linear": {
            "x": torch.ones(2, L, C), "weight": wide, "bias": vector, "eps": 1e-5,
            "stats_weight": torch.ones(C, C).triu(), "stats_bias": torch.ones(C), "shift": vector,
            "table": torch.ones(L, 2),
        },
        "cross_attention": {
            "q": torch.ones(N, H, d), "k": torch.ones(2, L, H, d), "v": torch.ones(2, L, H, d),
            "attn_mask": torch.zeros(N, L),
            "key_padding_mask": torch.zeros(2, L, dtype=torch.bool),
        },
        "cross_attention_maps": {
            "q": torch.ones(N, H, d), "k": torch.ones(2, L, H, d),
            "attn_mask": torch.zeros(N, L),
            "key_padding_mask": torch.zeros(2, L, dtype=torch.bool),
        },
    }[name]  # fmt: skip


OPERATIONS = [
    "linear_layer_norm",
    "linear_norm_linear",
    "folded_linear",
    "cross_attention",
    "cross_attention_maps",
]
TENSORS = [
    (operation, name)
    for operation in OPERATIONS
    for name, value in arguments(operation).items()
    if isinstance(value, torch.Tensor)
]
EACH_TENSOR = pytest.mark.parametrize(("operation", "name"), TENSORS)


def call(operation, **changes):
    return getattr(ops, operation)(**(arguments(operation) | changes))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_arguments_are_good(operation):
    others = {"backend", "places"}  # see test_places
    parameters = set(inspect.signature(getattr(ops, operation)).parameters) - others
    assert set(arguments(operation)) | {"eps"} == parameters | {"eps"}
    found = call(operation)
    assert all(out.numel() for out in (found if isinstance(found, tuple) else (found,)))


@EACH_TENSOR
@pytest.mark.parametrize(
    "convert", [torch.Tensor.numpy, torch.Tensor.tolist, bool], ids=["ndarray", "list", "bool"]
)
def test_something_else_than_a_tensor(operation, name, convert):
    value = True if convert is bool else convert(arguments(operation)[name])
    with pytest.raises(TypeError, match=f"^{name} must be a tensor, got {type(value).__name__}$"):
        call(operation, **{name: value})


@EACH_TENSOR
def test_sparse(operation, name):
    value = arguments(operation)[name].to_sparse()
    with pytest.raises(TypeError, match=f"^{name} must be a dense tensor, got a torch.sparse_coo"):
        call(operation, **{name: value})


@EACH_TENSOR
def test_integers(operation, name):
    with pytest.raises(TypeError, match=rf"^{name} must be .*(floating point|bool).*torch.int64"):
        call(operation, **{name: arguments(operation)[name].long()})


@pytest.mark.parametrize(
    ("operation", "name"),
    # These take any number of dimensions.
    [t for t in TENSORS if t not in (("linear_layer_norm", "x"), ("folded_linear", "x"))],
)
def test_two_dimensions_more(operation, name):
    with pytest.raises(InputError, match=rf"\b{name}\b"):
        call(operation, **{name: arguments(operation)[name][None, None]})


@EACH_TENSOR
def test_another_device(operation, name):
    with pytest.raises(InputError, match=rf"\b{name}\b.* on one device, got .*meta"):
        call(operation, **{name: arguments(operation)[name].to("meta")})


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (operation, name)
        for operation, name in TENSORS
        if name in ("x", "weight", "gain", "out_weight", "stats_weight", "stats_bias", "q")
    ],
)
def test_a_tensor_that_is_needed(operation, name):
    with pytest.raises(TypeError, match=f"^{name} must be a tensor, got NoneType$"):
        call(operation, **{name: None})


@pytest.mark.parametrize("positioned", [-1, N, 1.5, None])
def test_positioned(positioned):
    """Of those outputs that are not the queries'."""
    with pytest.raises(InputError, match="positioned must be an int between 0 and 2, got"):
        call("linear_norm_linear", positioned=positioned)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"places": [[0]]}, TypeError, "places must be a tensor, got list"),
        ({"places": torch.zeros(2, L)}, TypeError, "places must be int64, got torch.float32"),
        ({"places": torch.zeros(2, L).int()}, TypeError, "places must be int64, got torch.int32"),
        (
            {"places": torch.zeros(L).long()},
            InputError,
            r"places must be \[K, 5\], got shape \[5\]",
        ),
        ({"places": torch.zeros(2, 4).long()}, InputError, r"must be \[K, 5\], got shape \[2, 4\]"),
        ({"places": torch.zeros(0, L).long()}, InputError, r"must be \[K, 5\], got shape \[0, 5\]"),
        ({"places": PLACES.to("meta")}, InputError, "places and x must be on one device"),
        ({"places": PLACES, "positions": None}, InputError, "places need positions"),
        (
            {"places": PLACES, "positions": torch.ones(3, 7)},
            InputError,
            r"positions must have shape \[3, 8\], got \[3, 7\]",
        ),
        (
            {"places": PLACES, "positions": torch.ones(())},
            InputError,
            r"positions must have shape \[0, 8\], got \[\]",
        ),
        ({"places": PLACES, "positions": "no"}, TypeError, "positions must be a tensor, got str"),
    ],
)
def test_places(change, error, message):
    with pytest.raises(error, match=message):
        call("linear_norm_linear", **change)


@pytest.mark.parametrize("queried", [-1, N + 1, 1.5, None])
def test_queried(queried):
    with pytest.raises(InputError, match="queried must be an int between 0 and 3, got"):
        call("linear_norm_linear", queried=queried)


def test_queried_without_queries():
    with pytest.raises(InputError, match="queried must be an int between 0 and 0, got 1"):
        call("linear_norm_linear", queries=None)
