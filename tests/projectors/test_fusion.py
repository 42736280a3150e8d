"""Where calling a child does more than its parameters say, the child is called."""

import pytest
import torch
import torch.nn.utils.prune
from helpers import features, make, rms_error
from torch import nn
from torch.distributed.tensor import DTensor

from visproj.projectors.fusion import is_plain, is_plain_attention


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


def replace_forward(parent, name):
    child = getattr(parent, name)
    forward = child.forward
    child.forward = lambda x: forward(x).sin()


CHANGES = [adapt, hook, pre_hook, parametrize, prune, replace_forward]
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


def by_hand(projector, x):
    """Upstream's forward, every child called."""
    children = dict(projector.named_children())
    if "kv_proj" not in children:
        for child in children.values():
            x = child(x)
        return x
    y = projector.ln_kv(projector.kv_proj(x[:, 1:])).transpose(0, 1)
    pos = projector.pos_embed[:, None]
    q = projector.ln_q(projector.query)[:, None].repeat(1, y.shape[1], 1) + pos
    q, k, v = (
        nn.functional.linear(t, w, b).unflatten(-1, (projector.num_heads, -1)).permute(1, 2, 0, 3)
        for t, w, b in zip(
            (q, y + pos, y),
            projector.attn.in_proj_weight.chunk(3),
            projector.attn.in_proj_bias.chunk(3),
            strict=True,
        )
    )
    out = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    return projector.projection(projector.attn.out_proj(out))


@pytest.mark.parametrize(
    ("kind", "child", "change"),
    [
        pytest.param(kind, child, change, id=f"{kind}-{child}-{change.__name__}")
        for kind, child in CHILDREN
        for change in CHANGES
        # adapters, parametrisations and pruning are for Linears, some of them for norms
        if (change is not adapt or (kind, child) not in NOT_LINEAR)
        and (change in (hook, pre_hook, replace_forward) or child != "projection")
    ],
)
def test_a_changed_child_is_called(kind, child, change):
    projector = make(kind, query_grid=(4, 4)) if kind == "perceiver" else make(kind)
    x = features(2, 17)
    before = projector(x)
    parent, _, name = child.rpartition(".")
    change(projector.get_submodule(parent), name)
    projector.double()
    got = projector(x)
    torch.testing.assert_close(got, by_hand(projector, x), rtol=1e-11, atol=1e-11)
    assert not torch.allclose(got, before), "the change must be visible"


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_another_attention_is_called(options):
    projector = make("perceiver", query_grid=(4, 4))
    before = projector.attn
    projector.attn = nn.MultiheadAttention(64, 1, **options).double()
    projector.attn.load_state_dict(before.state_dict(), strict=False)
    if projector.attn.bias_k is not None:
        nn.init.normal_(projector.attn.bias_k)
        nn.init.normal_(projector.attn.bias_v)
    assert not is_plain_attention(projector.attn, 64)
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
    assert not is_plain_attention(projector.attn, 64)
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
    assert is_plain_attention(nn.MultiheadAttention(8, 2), 8)
    assert is_plain(nn.LayerNorm(4), nn.LayerNorm)


def test_subclasses_and_quantised_weights_are_not_plain():
    class Quantised(nn.Linear):
        pass

    assert not is_plain(Quantised(3, 4), nn.Linear)
    integer = nn.Linear(3, 4)
    integer.weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.int8), requires_grad=False)
    assert not is_plain(integer, nn.Linear)
    assert not is_plain_attention(nn.MultiheadAttention(8, 2, kdim=4, vdim=4), 8)


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
