"""Linear, LayerNorm and Linear, without saving the normalised rows for the backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visproj.backend import runs_triton
from visproj.errors import InputError
from visproj.ops import eager
from visproj.ops.autograd import (
    EMPTY,
    MAX_NORM_WIDTH,
    Operation,
    forbid_second_derivative,
    in_order,
    nothing_saved,
    saved_like,
    saves_for_backward,
)
from visproj.ops.checks import (
    check_all_floating,
    check_device,
    check_floating,
    check_operands,
    check_tensor,
    to_autocast_dtype,
)


class Inputs(NamedTuple):
    """Arguments of the custom operator; see :func:`linear_norm_linear`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    gain: Tensor
    shift: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    positions: Tensor | None
    queries: Tensor | None
    places: Tensor | None
    positioned: int
    queried: int
    eps: float
    save: bool


class BackwardInputs(NamedTuple):
    """Arguments of the backward operator."""

    grad: Tensor  # gradient of the output
    grad_queries: Tensor | None  # gradient of the projected queries
    x: Tensor
    weight: Tensor
    gain: Tensor
    shift: Tensor | None
    out_weight: Tensor
    positions: Tensor | None
    queries: Tensor | None
    places: Tensor | None
    y: Tensor  # x Wᵀ + b
    mean: Tensor  # mean of the rows of y
    rstd: Tensor  # reciprocal deviation of the rows of y
    positioned: int
    queried: int
    eps: float
    needs_dx: bool
    needs_dpositions: bool
    needs_dqueries: bool


def linear_norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    shift: Tensor | None,
    eps: float,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    positions: Tensor | None = None,
    places: Tensor | None = None,
    positioned: int = 0,
    queries: Tensor | None = None,
    queried: int = 0,
    backend: str | None = None,
) -> Any:
    """Compute a Linear, a LayerNorm and a second Linear: ``LayerNorm(x Wᵀ + b) Vᵀ + d``.

    Without a backward, the rows are normalised in place. For a backward, only ``y = x Wᵀ + b`` and
    the mean and reciprocal deviation of its rows are saved.

    Args:
        x: ``[B, L, C]``, floating, any strides.
        weight: ``W``, ``[D, C]``.
        bias: ``b``, ``[D]`` or ``None``.
        gain: ``[D]``.
        shift: ``[D]`` or ``None``.
        eps: Added to the variance.
        out_weight: ``V``, ``[queried + N, D]``.
        out_bias: ``d``, ``[queried + N]`` or ``None``.
        positions: ``[L, D]`` or ``None``: added to the normalised rows of every image, but only for
            the first ``positioned`` of the ``N`` outputs. They are multiplied by ``V`` once for all
            images.
        places: int64 ``[K, L]`` or ``None``: then ``positions`` are ``[R, D]``, and row ``i`` of
            every image gets the sum of the ``K`` positions at ``places[:, i]``. Only ``R`` rows are
            multiplied by ``V``. The values are not checked.
        positioned: Number of outputs that get positions.
        queries: ``[Q, D]`` or ``None``: rows that are multiplied by the first ``queried`` rows of
            ``V``, without LayerNorm or positions. So ``V`` can be an attention's joint weight for
            queries, keys and values, whose gradient is then written as one tensor.
        queried: Number of outputs for ``queries``; the other ``N`` outputs are for ``x``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; see :func:`visproj.use_backend`.

    Returns:
        ``[B, L, N]`` in the dtype of ``x``, or under autocast in autocast's dtype. With
        ``queries`` also their projection, ``[Q, queried]``.

    Raises:
        TypeError: If ``x`` is not floating point or, outside autocast, the dtypes differ.
        ValueError: If shapes do not fit or devices differ.
        RuntimeError: If ``"triton"`` was chosen and cannot run here.

    Source: DeepSpeed-VisualChat ``utils/model/vis_proj.py``, ``VisProjection_perceiver``.
    """
    operands = (x, weight, bias, gain, shift, out_weight, out_bias, positions, queries)
    inputs = Inputs(*operands, places, positioned, queried, eps, save=False)
    _check(inputs)
    D, N = weight.shape[0], out_weight.shape[0] - queried
    too_wide = f"D is {D}, more than {MAX_NORM_WIDTH}" if D > MAX_NORM_WIDTH else None
    if not runs_triton(x, backend, unsupported=too_wide) or not x.numel() * D * N:
        out, projected = eager.linear_norm_linear(*inputs[:-1])
    else:
        save = saves_for_backward(*operands)
        given = (*to_autocast_dtype(*operands), places, positioned, queried, eps, save)
        out, projected, *_ = _linear_norm_linear_fwd(*given, differentiable=save)
    return out if queries is None else (out, projected)


def _check(inputs: Inputs) -> None:
    """Raise as :func:`linear_norm_linear` says."""
    x, weight, out_weight = inputs.x, inputs.weight, inputs.out_weight
    check_all_floating(x=x, weight=weight, out_weight=out_weight, gain=inputs.gain)
    if weight.ndim != 2 or out_weight.ndim != 2 or out_weight.shape[1] != weight.shape[0]:
        raise InputError(
            "weight must be [D, C] and out_weight [queried + N, D], got shapes "
            f"{list(weight.shape)} and {list(out_weight.shape)}"
        )
    if x.ndim != 3 or x.shape[-1] != weight.shape[1]:
        raise InputError(f"x must be [B, L, {weight.shape[1]}], got shape {list(x.shape)}")
    N, D = out_weight.shape
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "weight": (weight, weight.shape),
        "bias": (inputs.bias, (D,)),
        "gain": (inputs.gain, (D,)),
        "shift": (inputs.shift, (D,)),
        "out_weight": (out_weight, (N, D)),
        "out_bias": (inputs.out_bias, (N,)),
        "positions": (inputs.positions, (_position_rows(inputs), D)),
    }
    queries = inputs.queries
    if queries is not None:
        check_all_floating(queries=queries)
        wanted["queries"] = queries, (*queries.shape[:1], D)
    check_operands("x", x, wanted)
    most = 0 if queries is None else N
    if not isinstance(inputs.queried, int) or not 0 <= inputs.queried <= most:
        raise InputError(f"queried must be an int between 0 and {most}, got {inputs.queried}")
    N -= inputs.queried
    if not isinstance(inputs.positioned, int) or not 0 <= inputs.positioned <= N:
        raise InputError(f"positioned must be an int between 0 and {N}, got {inputs.positioned}")


def _position_rows(inputs: Inputs) -> int:
    """Return how many positions there must be; raise unless ``places`` fit."""
    positions, places, length = inputs.positions, inputs.places, inputs.x.shape[1]
    if places is None:
        return length
    if positions is None:
        raise InputError("places need positions")
    check_floating("positions", positions)
    check_tensor("places", places)
    check_device("places", places, "x", inputs.x)
    if places.dtype != torch.int64:
        raise TypeError(f"places must be int64, got {places.dtype}")
    if places.ndim != 2 or not places.shape[0] or places.shape[1] != length:
        raise InputError(f"places must be [K, {length}], got shape {list(places.shape)}")
    return positions.shape[0] if positions.ndim else 0


def _run_fwd(*inputs: Any) -> tuple[Tensor | None, ...]:
    """Return the results, and with ``save`` y and its rows' mean and rstd for the backward."""
    from visproj.kernels.layer_norm import layer_norm_fwd
    from visproj.kernels.linear import Epilogue, library_product, linear_fwd

    given = Inputs(*inputs)
    x, weight, bias = given.x, given.weight, given.bias
    (query_weight, query_bias), (out_weight, out_bias) = eager.queried_and_others(
        given.out_weight, given.out_bias, given.queried
    )
    projected = table = None
    if given.queries is not None:
        projected = F.linear(given.queries, query_weight, query_bias)
    if given.positions is not None:
        table = F.linear(given.positions, out_weight[: given.positioned])
        table = eager.placed(table, given.places)
    # PyTorch's matmul copies x first if it is not contiguous, as features without their CLS row
    # are. The kernel reads them in place.
    y = F.linear(x, weight, bias) if x.is_contiguous() else linear_fwd(x, weight, Epilogue(bias))
    normal, mean, rstd = layer_norm_fwd(
        y.contiguous(),
        given.gain,
        given.shift,
        given.eps,
        out_dtype=y.dtype,
        in_place=not given.save,
        statistics=given.save,
    )
    if table is None:
        out = library_product(normal, out_weight, out_bias)
    else:
        out = linear_fwd(normal, out_weight, Epilogue(out_bias, table=table))
    return out, projected, y if given.save else None, mean, rstd


_linear_norm_linear_fwd = Operation(
    "linear_norm_linear_fwd", Inputs, "(Tensor, Tensor, Tensor, Tensor, Tensor)", _run_fwd
)


@_linear_norm_linear_fwd.custom.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    given = Inputs(*inputs)
    x, queries = given.x, given.queries
    out = x.new_empty((*x.shape[:-1], given.out_weight.shape[0] - given.queried))
    projected = x.new_empty(EMPTY if queries is None else (queries.shape[0], given.queried))
    y = x.new_empty((*x.shape[:-1], given.weight.shape[0]))
    return (out, projected, *(saved_like(y) if given.save else nothing_saved(x)))


def _run_bwd(*inputs: Any) -> list[Tensor]:
    """Return the gradients of all weights, then dx, dpositions and dqueries if needed."""
    from visproj.kernels.layer_norm import layer_norm_bwd
    from visproj.kernels.linear_backward import linear_bwd_weight

    given = BackwardInputs(*inputs)
    grad, x, y = given.grad, given.x, given.y
    gain, queried = given.gain, given.queried
    query_weight, out_weight = given.out_weight.tensor_split([queried])
    rows = grad.flatten(0, 1)
    norm = [t.flatten(0, 1) for t in (y, given.mean, given.rstd)]
    dy, *sums = layer_norm_bwd(rows @ out_weight, *norm, gain, in_place=True)
    dgain, dshift, dbias = (t.to(gain.dtype) for t in sums)
    whole = torch.empty_like(given.out_weight, memory_format=torch.contiguous_format)
    whole_bias = whole.new_empty(len(whole))
    dquery_weight, dout_weight = whole.tensor_split([queried])
    dquery_bias, dout_bias = whole_bias.tensor_split([queried])
    linear_bwd_weight(rows, *norm, gain, given.shift, given.eps, dout_weight, dout_bias)
    dweight = dy.T @ x.reshape(-1, x.shape[-1])
    gradients = [dweight, dbias, dgain, dshift, whole, whole_bias]
    if given.needs_dx:
        gradients.append((dy @ given.weight).reshape(x.shape))
    if given.positions is not None:
        dtable = grad[..., : given.positioned]
        if given.places is None:
            dtable = dtable.sum(0)  # [L, positioned]
        else:
            dtable = _summed_by_place(dtable, given.places, len(given.positions))
        dout_weight[: given.positioned].addmm_(dtable.T, given.positions)
        if given.needs_dpositions:
            gradients.append(dtable @ out_weight[: given.positioned])
    if given.queries is not None:
        dprojected = given.grad_queries
        if dprojected is None:
            dprojected = given.queries.new_zeros(len(given.queries), queried)
        torch.mm(dprojected.T, given.queries, out=dquery_weight)
        torch.sum(dprojected, 0, out=dquery_bias)
        if given.needs_dqueries:
            gradients.append(dprojected @ query_weight)
    return gradients


def _summed_by_place(grad: Tensor, places: Tensor, count: int) -> Tensor:
    """Return ``[count, N]``: the sums of those rows of ``grad [B, L, N]`` that have a place.

    Summed at least in fp32 and in a fixed order.
    """
    rows = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))
    add = torch.ops.aten.embedding_dense_backward
    sums = torch.stack([add(rows, index, count, -1, False) for index in places])
    return sums.sum(0).to(grad.dtype)


_linear_norm_linear_bwd = Operation("linear_norm_linear_bwd", BackwardInputs, "Tensor[]", _run_bwd)


@_linear_norm_linear_bwd.custom.register_fake
def _(*inputs: Any) -> list[Tensor]:
    given = BackwardInputs(*inputs)
    x, queries = given.x, given.queries
    N, D = given.out_weight.shape
    shapes: list[tuple[int, ...]] = [given.weight.shape, (D,), (D,), (D,), (N, D), (N,)]
    shapes += [x.shape] * given.needs_dx
    if given.positions is not None and given.needs_dpositions:
        shapes.append(given.positions.shape)
    if queries is not None and given.needs_dqueries:
        shapes.append(queries.shape)
    return [x.new_empty(shape) for shape in shapes]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = Inputs(*inputs)
    ctx.settings = given.positioned, given.queried, given.eps
    ctx.absent = [name for name in ("bias", "shift", "out_bias") if getattr(given, name) is None]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    x, weight, gain, shift = given.x, given.weight, given.gain, given.shift
    ctx.shape = output[0].shape
    others = given.positions, given.queries, given.places
    ctx.save_for_backward(x, weight, gain, shift, given.out_weight, *others, *output[2:])


def _differentiate(
    ctx: Any, grad: Tensor | None, grad_queries: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if grad is None:
        if grad_queries is None:
            return in_order(Inputs)
        grad = saved[0].new_zeros(ctx.shape)
    needed = Inputs(*ctx.needs_input_grad)
    wanted = *ctx.settings, needed.x, needed.positions, needed.queries
    again = torch.is_grad_enabled()
    found = _linear_norm_linear_bwd(grad, grad_queries, *saved, *wanted, differentiable=again)
    dweight, dbias, dgain, dshift, dout_weight, dout_bias, *others = found
    gradients = {
        "weight": dweight,
        "bias": dbias,
        "gain": dgain,
        "shift": dshift,
        "out_weight": dout_weight,
        "out_bias": dout_bias,
        "x": others.pop(0) if needed.x else None,
        "positions": others.pop(0) if needed.positions else None,
        "queries": others.pop(0) if needed.queries else None,
    }
    return in_order(Inputs, **gradients | dict.fromkeys(ctx.absent))


_linear_norm_linear_fwd.register_autograd(_differentiate, _setup_context)
forbid_second_derivative(_linear_norm_linear_bwd)
