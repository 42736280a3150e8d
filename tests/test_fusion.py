"""Where calling a child does more than its parameters say, the child is called."""

import warnings

import pytest
import torch
import torch.nn.utils.prune
from helpers import children_called, features, is_plain, make, rms_error, small
from torch import nn
from torch.distributed.tensor import DTensor

from visproj import use_backend


class Adapter(nn.Module):
    """A LoRA-like wrapper: it forwards ``weight`` and ``bias`` and adds to the result."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.delta = nn.Parameter(torch.randn_like(base.weight) * 0.1)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)
    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)

    def forward(self, x):
        return self.base(x) + x @ self.delta.T


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def adapt(parent, name):
    setattr(parent, name, Adapter(getattr(parent, name)))


def hook(parent, name):
    getattr(parent, name).register_forward_hook(lambda module, args, out: out.sin())


def pre_hook(parent, name):
    getattr(parent, name).register_forward_pre_hook(lambda module, args: (args[0].sin(),))


def parametrize(parent, name):
    nn.utils.parametrize.register_parametrization(getattr(parent, name), "weight", Doubled())


def prune(parent, name):
    nn.utils.prune.random_unstructured(getattr(parent, name), "weight", 0.5)


def weight_norm(parent, name):
    child = getattr(parent, name)
    nn.utils.parametrizations.weight_norm(child)
    with torch.no_grad():
        child.parametrizations.weight.original0.mul_(2)


def old_weight_norm(parent, name):
    child = getattr(parent, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(child)
    with torch.no_grad():
        child.weight_g.mul_(2)


class Int8Linear(nn.Linear):
    """As bitsandbytes does it: a Linear whose weight is of int8, with scales beside it."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7  # 4 bits, to be seen
        self.register_buffer("scale", scale)
        integers = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(integers, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def quantise(parent, name):
    setattr(parent, name, Int8Linear(getattr(parent, name)))


def replace_forward(parent, name):
    child = getattr(parent, name)
    forward = child.forward
    child.forward = lambda x: forward(x).sin()


FOR_LINEARS = [adapt, quantise, weight_norm, old_weight_norm]
FOR_WEIGHTS = [parametrize, prune, *FOR_LINEARS]
CHANGES = [hook, pre_hook, replace_forward, *FOR_WEIGHTS]
CHILDREN = [
    ("baseline", "0"),
    ("baseline", "1"),
    ("vit", "projection.0"),
    ("vit", "projection.1"),
    ("vit", "projection"),
    ("vit", "vis_layer.mlp.fc1"),
    ("perceiver", "kv_proj"),
    ("perceiver", "ln_kv"),
    ("perceiver", "ln_q"),
    ("perceiver", "attn.out_proj"),
    ("perceiver", "projection.1"),
]
NOT_LINEAR = {
    ("vit", "projection"),
    ("baseline", "1"),
    ("vit", "projection.1"),
    ("perceiver", "ln_kv"),
    ("perceiver", "ln_q"),
}


CASES = [
    pytest.param(kind, child, change, id=f"{kind}-{child}-{change.__name__}")
    for kind, child in CHILDREN
    for change in CHANGES
    if (change not in FOR_LINEARS or (kind, child) not in NOT_LINEAR)
    and (change not in FOR_WEIGHTS or child != "projection")
]


def changed(kind, child, change, dtype=torch.float64, device="cpu"):
    """A small projector with one of its children changed."""
    projector = small(kind, dtype, device)
    parent, _, name = child.rpartition(".")
    change(projector.get_submodule(parent), name)
    return projector.to(dtype=dtype, device=device)


@pytest.mark.parametrize(("kind", "child", "change"), CASES)
def test_a_changed_child_is_called(kind, child, change):
    projector = changed(kind, child, change)
    x = features(2, 17)
    got = projector(x)
    torch.testing.assert_close(got, children_called(projector, x), rtol=1e-11, atol=1e-11)
    torch.manual_seed(0)
    assert not torch.allclose(got, small(kind)(x)), "the change must be visible"


@pytest.mark.parametrize(("kind", "child", "change"), CASES)
def test_a_changed_child_is_called_among_kernels(kind, child, change, device):
    projector = changed(kind, child, change, torch.float32, device)
    x = features(2, 17, dtype=torch.float32, device=device)
    wanted = children_called(projector, x)
    with use_backend("triton"):
        # Two chains of a dozen fp32 products; another weight would show as 1e-2 and more.
        assert rms_error(projector(x), wanted) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("hooks", ["full_backward_hook", "full_backward_pre_hook"])
@pytest.mark.parametrize(("kind", "child"), [case for case in CHILDREN if case[1] != "ln_q"])
def test_backward_hooks_run(kind, child, hooks, backend, device):
    """Gradients that a hook has doubled reach the features."""
    projector = small(kind, torch.float32, device)
    x = features(2, 17, dtype=torch.float32, device=device).requires_grad_()

    def double(module, *grads):
        return tuple(2 * grad for grad in grads[0])

    getattr(projector.get_submodule(child), f"register_{hooks}")(double)
    with use_backend(backend):
        out = projector(x)
    upstream = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, x, upstream)
    (wanted,) = torch.autograd.grad(children_called(projector, x), x, upstream)
    # Gradients of a softmax cancel in part, so that fp32's 1e-6 may grow tenfold.
    assert rms_error(got, wanted) < 1e-5


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_another_attention_is_called(options):
    projector = make("perceiver", query_grid=(4, 4))
    before = projector.attn
    projector.attn = nn.MultiheadAttention(64, 1, **options).double()
    projector.attn.load_state_dict(before.state_dict(), strict=False)
    if projector.attn.bias_k is not None:
        nn.init.normal_(projector.attn.bias_k)
        nn.init.normal_(projector.attn.bias_v)
    assert not is_plain(projector.attn, nn.MultiheadAttention)
    x = features(2, 17)
    y = projector.ln_kv(projector.kv_proj(x[:, 1:])).transpose(0, 1)
    pos = projector.pos_embed[:, None]
    q = (projector.ln_q(projector.query)[:, None] + pos).repeat(1, 2, 1)
    wanted = projector.projection(projector.attn(q, y + pos, y)[0].transpose(0, 1))
    torch.testing.assert_close(projector(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["attn_mask", "key_padding_mask"])
def test_called_attention_keeps_the_masking_contract(form):
    """A query without keys gets zero attention, and maps come out, through the child as well."""
    projector = make("perceiver", query_grid=(2, 2), num_heads=2)
    x = features(2, 10)
    masks = {
        "attn_mask": torch.zeros(4, 9, dtype=torch.bool).index_fill(0, torch.tensor([1]), True),
        "key_padding_mask": torch.tensor([[True] * 9, [False] * 9]),
    }
    masks = {form: masks[form]}
    wanted, wanted_maps = projector(x, return_attention=True, **masks)
    projector.attn.register_forward_hook(lambda *_: None)
    assert not is_plain(projector.attn, nn.MultiheadAttention)
    got, maps = projector(x, return_attention=True, **masks)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(maps, wanted_maps, rtol=1e-12, atol=1e-12)


def test_called_attention_takes_masks_of_another_dtype_and_batch_first():
    projector = make("perceiver", query_grid=(2, 2), num_heads=2, dtype=torch.bfloat16)
    x = features(2, 10, dtype=torch.bfloat16)
    mask = torch.zeros(4, 9)
    mask[:, 5:] = torch.finfo(torch.float32).min
    wanted = projector(x, mask)
    swapped = nn.MultiheadAttention(64, 2, batch_first=True).bfloat16()
    swapped.load_state_dict(projector.attn.state_dict())
    projector.attn = swapped
    assert torch.equal(projector(x, mask), wanted)
    swapped.register_forward_hook(lambda *_: None)
    # Queries repeated and projected per image round as often as shared ones.
    assert rms_error(projector(x, mask), wanted) < 2 * torch.finfo(torch.bfloat16).eps


def test_maps_under_dropout_are_refused():
    projector = make("perceiver", query_grid=(2, 2))
    projector.attn.dropout = 0.5
    with pytest.raises(ValueError, match=r"attn\.dropout off"):
        projector(features(1, 17), return_attention=True)


def test_attention_dropout_is_kept():
    projector = make("perceiver", query_grid=(2, 2))
    projector.attn.dropout = 0.5
    x = features(1, 17)
    assert not torch.equal(projector.train()(x), projector(x))
    assert torch.equal(projector.eval()(x), projector(x))


def test_plain_modules():
    assert is_plain(nn.Linear(3, 4), nn.Linear)
    assert is_plain(nn.MultiheadAttention(8, 2), nn.MultiheadAttention)
    assert is_plain(nn.LayerNorm(4), nn.LayerNorm)


def test_subclasses_and_quantised_weights_are_not_plain():
    class Quantised(nn.Linear):
        pass

    assert not is_plain(Quantised(3, 4), nn.Linear)
    integer = nn.Linear(3, 4)
    integer.weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.int8), requires_grad=False)
    assert not is_plain(integer, nn.Linear)
    assert not is_plain(nn.MultiheadAttention(8, 2, kdim=4, vdim=4), nn.MultiheadAttention)


def test_sharded_weights_are_not_plain(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        linear = distribute_module(nn.Linear(3, 4), init_device_mesh("cpu", (1,)))
        assert isinstance(linear.weight, DTensor)
        assert not is_plain(linear, nn.Linear)
    finally:
        dist.destroy_process_group()


def test_zero_partitioned_parameters_are_exempt_from_the_hook_rule():
    linear = nn.Linear(3, 4)
    linear.register_forward_pre_hook(lambda *_: None)
    assert not is_plain(linear, nn.Linear)
    linear.weight.ds_id = 0
    assert is_plain(linear, nn.Linear)


def test_zero_hooks_on_a_container_leave_it_plain():
    container = nn.Sequential(nn.Linear(3, 4))
    container.register_forward_pre_hook(lambda *_: None)
    assert not is_plain(container, nn.Sequential)
    container[0].weight.ds_id = 0
    assert is_plain(container, nn.Sequential)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["baseline", "vit", "perceiver"])
def test_pytorchs_own_int8(kind):
    projector = small(kind, torch.float32).eval()
    quantised = torch.ao.quantization.quantize_dynamic(projector, {nn.Linear}, dtype=torch.qint8)
    x = features(2, 17, dtype=torch.float32)
    # The same fp32 chain behind 8-bit products, attention by another formula.
    assert rms_error(quantised(x), children_called(quantised, x)) < 1e-6
    assert rms_error(quantised(x), projector(x)) > 1e-3, "8 bits must be visible"
