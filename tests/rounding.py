"""How far rounding alone moves the results of a formula: the scale of what comparisons allow."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# In 16 bits values are rounded once, by less than half a unit roundoff on average. Those in fp32
# are partial sums, rounded as often as something is added.
SHARE = {torch.float16: 0.5, torch.bfloat16: 0.5, torch.float32: 2.0}
DRAWS = 4  # of the directions: in a single one, two roundings of a lone number may cancel

aten = torch.ops.aten
SUMS = {
    *(aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.mv, aten.addmv, aten.dot),
    *(aten.sum, aten.mean, aten._softmax, aten._safe_softmax, aten._softmax_backward_data),
    *(aten.native_layer_norm, aten.native_layer_norm_backward),
    *(aten.convolution, aten.convolution_backward),
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
}


class _Rounding(TorchDispatchMode):
    """Moves each term of a sum by a unit roundoff of ``dtype``, and each result by one of fp32.

    Operands are stored in ``dtype``; what is made of them is added up and kept in fp32. A sum that
    cancels is moved by the size of its terms, as by real rounding, however small the sum itself.
    """

    def __init__(self, dtype, generator):
        super().__init__()
        self.stored = torch.finfo(dtype).eps / 2
        self.computed = min(self.stored, 2.0**-24)
        self.generator = generator

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # skipping it takes importing it, seconds of it

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        sums = function.overloadpacket in SUMS
        if sums:
            args = [self.moved(arg, self.stored) for arg in args]
        out = function(*args, **kwargs or {})
        if not sums and (torch.Tag.pointwise not in function.tags or function._schema.is_mutable):
            return out
        if isinstance(out, torch.Tensor):
            return self.moved(out, self.computed)
        return tuple(self.moved(one, self.computed) for one in out)

    def moved(self, tensor, unit):
        """Each element larger or smaller by ``unit`` of its size; a mask of finfo.min stays."""
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            return tensor
        up = torch.empty(tensor.shape, dtype=torch.float64).bernoulli_(generator=self.generator)
        factor = up.mul_(2 * unit).add_(1 - unit).to(tensor.device)
        return torch.where(tensor.abs() < 2.0**64, tensor * factor, tensor)


def roundings(function, dtype):
    """How far rounding to ``dtype`` moves each element of each tensor that ``function`` returns.

    Args:
        function: Computes in fp64, without arguments. It is called ``1 + DRAWS`` times.
        dtype: The dtype whose roundings are imitated.

    Returns:
        For each tensor the largest distances seen, times SHARE: of the size of a real error.
    """
    exact, generator = function(), torch.Generator().manual_seed(0)
    farthest = [torch.zeros_like(tensor) for tensor in exact]
    for _ in range(DRAWS):
        with _Rounding(dtype, generator):
            found = function()
        for far, one, truth in zip(farthest, found, exact, strict=True):
            torch.maximum(far, (one - truth).abs(), out=far)
    return [far * SHARE[dtype] for far in farthest]


def largest(tensor):
    return tensor.abs().max().item()


def rms(tensor):
    return tensor.square().mean().sqrt().item()


def within(norm, error, allowed, moved, what):
    """Assert that an error is what is allowed, or else what rounding accounts for.

    A bound that is relative to a result, or to another computation's error, means nothing where
    terms of any size cancel or where the other happens to be exact.

    Args:
        norm: ``largest`` or ``rms``.
        error: What was computed minus what is true.
        allowed: For the norm of the error.
        moved: Returns what ``roundings`` found for this result; called only where it decides.
        what: Name of the result.
    """
    found = norm(error)
    if not found <= allowed:  # nor is NaN
        allowed = max(allowed, norm(moved()))
    assert found <= allowed, f"{what}: error {found:.3g}, allowed {allowed:.3g}"
