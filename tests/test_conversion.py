"""``convert`` and ``revert``: upstream's projectors inside a model exchanged for ours, and back."""

import copy
import pickle

import peft
import pytest
import torch
import torch.nn.utils.prune
from helpers import features, rms_error
from torch import nn
from upstream import KINDS, UpstreamModel, upstream_projector

import visproj
from visproj.recognition import PROJECTORS as _PROJECTORS


def named(model):
    """Names and identities of the parameters, in the order that optimisers count them by."""
    return [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind):
    model = UpstreamModel(kind)
    x, original, parameters = features(2, 17), model.projection, named(model)
    wanted, keys = model(x), list(model.state_dict())

    assert visproj.convert(model) == ["projection"]
    assert isinstance(model.projection, _PROJECTORS)
    # Both forms are fp64 chains of a dozen products.
    torch.testing.assert_close(model(x), wanted, rtol=1e-10, atol=1e-10)
    assert named(model) == parameters
    assert list(model.state_dict()) == keys

    assert visproj.revert(model) == ["projection"]
    assert model.projection is original
    assert named(model) == parameters
    assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on(kind):
    """Adam's moments belong to the parameters, which stay: losses are those of plain modules."""

    def losses(changes):
        torch.manual_seed(0)
        model = UpstreamModel(kind)
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        for change in changes:
            change(model)
            optimiser.zero_grad()
            loss = (model(features(2, 17)) - 1).square().mean()
            loss.backward()
            optimiser.step()
            yield loss.item()

    def nothing(model):
        return None

    plain = list(losses([nothing] * 6))
    changed = list(losses([nothing, visproj.convert, nothing, visproj.revert, nothing, nothing]))
    # Where a gradient is zero but for roundings, Adam makes steps of up to 1e-2 from their signs.
    assert changed == pytest.approx(plain, rel=1e-6)
    assert plain[-1] < plain[0]


def test_optimiser_state_dict_loads_across():
    model = UpstreamModel("perceiver")
    optimiser = torch.optim.Adam(model.parameters())
    model(features(1, 17)).sum().backward()
    optimiser.step()
    visproj.convert(model)
    fresh = torch.optim.Adam(model.parameters())
    fresh.load_state_dict(optimiser.state_dict())
    weight = model.projection.attn.in_proj_weight
    assert torch.equal(fresh.state[weight]["exp_avg"], optimiser.state[weight]["exp_avg"])


@pytest.mark.parametrize("kind", KINDS)
def test_modes_and_frozen_parameters_stay(kind):
    model = UpstreamModel(kind)
    frozen = next(p for p in model.projection.parameters() if p.requires_grad)
    frozen.requires_grad_(False)
    model.projection.eval()
    last = list(model.projection.modules())[-1].train()
    grads = [p.requires_grad for p in model.parameters()]
    for change in (visproj.convert, visproj.revert):
        change(model)
        assert [p.requires_grad for p in model.parameters()] == grads
        assert not model.projection.training
        assert list(model.projection.modules())[-1] is last
        assert last.training


def test_tied_parameters_stay_tied():
    model = UpstreamModel("perceiver")
    model.lang_decoder[0].weight = model.projection.projection[1].weight
    for change in (visproj.convert, visproj.revert):
        change(model)
        assert model.lang_decoder[0].weight is model.projection.projection[1].weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_reverts_by_itself(kind, duplicate):
    model = UpstreamModel(kind)
    visproj.convert(model)
    other = duplicate(model)
    with torch.no_grad():
        for parameter in other.projection.parameters():
            parameter.mul_(1.1)
    x = features(1, 17)
    wanted = other(x)
    visproj.revert(other)
    assert not isinstance(other.projection, _PROJECTORS)
    torch.testing.assert_close(other(x), wanted, rtol=1e-10, atol=1e-10)
    assert isinstance(model.projection, _PROJECTORS)


@pytest.mark.parametrize("kind", KINDS)
def test_revert_takes_the_parameters_of_today(kind):
    """Also where loading and casting have put other objects in their place."""
    model = UpstreamModel(kind)
    visproj.convert(model)
    state = {key: value * 1.5 for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    parameters = named(model)
    visproj.revert(model)
    assert named(model) == parameters
    model.load_state_dict(state)  # strict


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_and_adapters_of_children_go_along(kind):
    model = UpstreamModel(kind)
    child = {"baseline": "0", "vit": "projection.0", "perceiver": "kv_proj"}[kind]
    x = features(1, 17)
    plain = model(x)
    model.projection.get_submodule(child).register_forward_hook(lambda module, args, out: out.sin())
    wanted = model(x)
    visproj.convert(model)
    torch.testing.assert_close(model(x), wanted, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(wanted, plain), "the hook must be visible"

    parent, _, name = child.rpartition(".")
    parent = model.projection.get_submodule(parent)
    config = peft.LoraConfig(target_modules=[name], init_lora_weights=False)
    peft.inject_adapter_in_model(config, parent)
    adapted = model.double()(x)
    assert not torch.allclose(adapted, wanted), "the adapter must be visible"
    visproj.revert(model)
    torch.testing.assert_close(model(x), adapted, rtol=1e-10, atol=1e-10)


def test_anywhere_in_a_model():
    shared = upstream_projector("vit")
    model = nn.ModuleDict(
        {
            "one": nn.ModuleList([nn.Identity(), upstream_projector("perceiver")]),
            "two": nn.Sequential(shared, nn.ReLU()),
            "three": shared,
            "projection": upstream_projector("baseline"),
            "other": upstream_projector("baseline"),
        }
    )
    other = model["other"]
    replaced = ["three", "projection", "one.1", "two.0"]
    assert visproj.convert(model) == replaced
    assert model["two"][0] is model["three"]
    assert model["other"] is other, "Linear and LayerNorm under another name are anybody's"
    assert visproj.convert(model) == [], "projectors of visproj's own stay, and their insides"
    assert visproj.revert(model) == replaced
    assert model["two"][0] is shared


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_new", "relu", "silu"])
def test_every_activation_is_recognised(activation):
    model = UpstreamModel("vit", hidden_act=activation, layer_norm_eps=1e-3)
    x = features(1, 17)
    wanted = model(x)
    visproj.convert(model)
    assert rms_error(model(x), wanted) < 1e-12  # fp64 throughout
    assert model.projection.vis_layer.layer_norm1.eps == 1e-3


def test_attention_dropout_is_kept():
    model = UpstreamModel("vit", attention_dropout=0.25)
    visproj.convert(model)
    assert model.projection.vis_layer.self_attn.dropout == 0.25


def test_shapes_of_partitioned_parameters():
    """ZeRO-3 leaves ``ds_shape`` and no data."""
    model = UpstreamModel("perceiver")
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    assert visproj.convert(model) == ["projection"]
    assert model.projection.num_queries == 16


def lora(projector):
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["kv_proj"]), projector)


def narrow(projector):
    projector.ln_kv = nn.LayerNorm(32)


def no_bias(projector):
    projector.kv_proj = nn.Linear(32, 64, bias=False)


def parametrize(projector):
    nn.utils.parametrizations.weight_norm(projector.kv_proj)


def prune(projector):
    nn.utils.prune.random_unstructured(projector.kv_proj, "weight", 0.5)


def fewer_queries(projector):
    projector.query = nn.Parameter(torch.zeros(12, 64))
    projector.pos_embed = nn.Parameter(torch.zeros(12, 64), requires_grad=False)


def shorter(projector):
    projector.projection = nn.Sequential(nn.LayerNorm(64))


def lora_baseline(projector):
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), projector)


def hook(projector):
    projector.register_forward_hook(lambda *_: None)


def state_hook(projector):
    projector.register_state_dict_post_hook(lambda *_: None)


def hook_inside(projector):
    projector.vis_layer.mlp.register_full_backward_hook(lambda *_: None)


def new_forward(projector):
    projector.forward = lambda x: x


def new_activation(projector):
    projector.vis_layer.mlp.activation_fn = nn.Tanh()


def checkpointing(projector):
    projector.vis_layer.gradient_checkpointing = True


REFUSED = {
    lora: ("perceiver", r"projection is built like .* perceiver projector, but its kv_proj is a "
           r"peft\.tuners\.lora\.layer\.Linear, not a plain Linear; convert before adapters"),
    narrow: ("perceiver", r"its ln_kv\.bias is \[32\], but should be \[64\]"),
    no_bias: ("perceiver", r"its kv_proj\.bias is absent, but should be \[64\]"),
    parametrize: ("perceiver", r"its kv_proj is a .*ParametrizedLinear, not a plain Linear"),
    prune: ("perceiver", r"its kv_proj\.weight is absent, but should be \[64, 32\]"),
    fewer_queries: ("perceiver", r"its pos_embed is \[12, 64\], but should be \[9, 64\]"),
    shorter: ("perceiver", r"it has no projection\.1"),
    lora_baseline: ("baseline", r"its 0 is a peft\.tuners\.lora\.layer\.Linear"),
    hook: ("baseline", r"^projection has forward_hooks, which would be lost"),
    state_hook: ("perceiver", r"^projection has state_dict_hooks, which would be lost"),
    hook_inside: ("vit", r"^projection\.vis_layer\.mlp has backward_hooks, which would be lost"),
    new_forward: ("perceiver", r"^projection has a replaced forward, which would be lost"),
    new_activation: ("vit", r"its activation is none of quick_gelu, gelu"),
    checkpointing: ("vit", r"its vis_layer uses gradient checkpointing"),
}  # fmt: skip


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_refused(spoil):
    kind, message = REFUSED[spoil]
    model = UpstreamModel(kind)
    spoil(model.projection)
    pair = nn.ModuleList([upstream_projector("perceiver"), model])
    before = list(pair.modules())
    with pytest.raises(ValueError, match=message.replace("^", r"^1\.")):
        visproj.convert(pair)
    assert list(pair.modules()) == before, "nothing may be replaced where not all can be"


@pytest.mark.parametrize("names", [("connector", "projection"), ("projection", "connector")])
def test_a_baseline_under_two_names(names):
    """One of them says what it is."""
    model = nn.Module()
    pair = upstream_projector("baseline")
    for name in names:
        setattr(model, name, pair)
    assert set(visproj.convert(model)) == set(names)
    assert model.connector is model.projection is not pair
    assert set(visproj.revert(model)) == set(names)
    assert model.connector is model.projection is pair


def test_hooks_put_on_after_converting_are_not_lost_in_silence():
    model = UpstreamModel("perceiver")
    visproj.convert(model)
    model.projection.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match="projection has forward_pre_hooks, which would be lost"):
        visproj.revert(model)


@pytest.mark.parametrize("kind", ["vit", "perceiver"])
def test_a_projector_by_itself(kind):
    with pytest.raises(ValueError, match="is a projector itself: pass the module that holds it"):
        visproj.convert(upstream_projector(kind))


def optional_layer():
    module = nn.Module()
    module.register_module("vis_layer", None)
    module.projection = nn.Linear(32, 64)
    return module


@pytest.mark.parametrize(
    "projection",
    [
        optional_layer(),
        nn.Linear(32, 64),
        nn.Sequential(nn.Linear(32, 64), nn.ReLU()),
        nn.Sequential(nn.Conv1d(32, 64, 1), nn.LayerNorm(64)),
        nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.ReLU()),
        nn.ModuleDict({"vis_layer": nn.Linear(32, 32), "projection": nn.Linear(32, 64)}),
    ],
    ids=str,
)
def test_nothing_to_convert(projection):
    model = nn.ModuleDict({"projection": projection})
    with pytest.raises(ValueError, match="ModuleDict holds no projector of DeepSpeed-VisualChat"):
        visproj.convert(model)
    with pytest.raises(ValueError, match=r"holds no projector that visproj\.convert put there"):
        visproj.revert(model)
