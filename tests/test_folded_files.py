"""Files of folded projectors that are damaged, and why a projector cannot be folded."""

import json

import pytest
import torch
from helpers import features, make
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

from visproj import LinearProjector, fold, load_folded
from visproj.errors import InputError

BIAS = "kv.linear.bias"


def change_config(**changes):
    def damage(state, metadata):
        metadata["config"] = json.dumps({**json.loads(metadata["config"]), **changes})

    return damage


def drop_entry(state, metadata):
    config = json.loads(metadata["config"])
    config.pop("vis_dim")
    metadata["config"] = json.dumps(config)


DAMAGE = {
    "an older format": (lambda s, m: m.update(format="visproj-folded-1"), "folded-1: fold again"),
    "no class": (lambda s, m: m.pop("class"), "its class is ''"),
    "a class of ours": (lambda s, m: m.update({"class": "FoldedProjector"}), "FoldedProjector"),
    "a dunder": (lambda s, m: m.update({"class": "__dict__"}), "its class is '__dict__'"),
    "another class": (lambda s, m: m.update({"class": "FoldedViT"}), "has the entries"),
    "no configuration": (lambda s, m: m.pop("config"), "not valid JSON"),
    "no JSON": (lambda s, m: m.update(config="{'a'"), "not valid JSON"),
    "a list": (lambda s, m: m.update(config="[1]"), "has the entries list"),
    "an entry more": (change_config(rope=True), "has the entries"),
    "an entry less": (drop_entry, "has the entries"),
    "width of text": (change_config(vis_dim="wide"), "vis_dim in its configuration"),
    "no width": (change_config(lang_dim=0), "lang_dim in its configuration"),
    "eps": (change_config(floor="small"), "floor in its configuration"),
    "heads": (change_config(num_heads=7), "7 heads do not divide"),
    "grid": (change_config(grid=7), "damaged"),
    "another grid": (change_config(grid=[3, 3]), r"kv_table \[256, 64\], not \[9, 64\]"),
    "CLS": (change_config(has_cls=None), "has_cls in its configuration"),
    "a constant less": (lambda s, m: s.pop("queries"), "missing queries"),
    "a constant more": (lambda s, m: s.update(forward=torch.ones(1)), "unexpected forward"),
    "a shape": (lambda s, m: s.update({BIAS: torch.ones(3)}), r"bias \[3\], not \[128\]"),
    "integers": (lambda s, m: s.update({BIAS: torch.ones(128).int()}), "bias .*int32"),
    "placeholders": (lambda s, m: s.update({BIAS: torch.empty(0)}), "placeholders"),
}


def rewrite(path, damage):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    damage(state, metadata)
    save_file(state, path, metadata)


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files(case, tmp_path):
    path = tmp_path / "folded.safetensors"
    fold(make("perceiver")).save(path)
    damage, message = DAMAGE[case]
    rewrite(path, damage)
    with pytest.raises(InputError, match=message) as refused:
        load_folded(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("vision", [None, {}, {"hidden_size": "wide"}], ids=str)
def test_damaged_clip_layers(vision, tmp_path):
    path = tmp_path / "folded.safetensors"
    fold(make("vit")).save(path)
    rewrite(path, change_config(vision=vision))
    with pytest.raises(InputError, match=f"{path} is damaged: "):
        load_folded(path)


@pytest.mark.parametrize("widths", [(32, 64), (32, 32), (64, 32)], ids=str)
@pytest.mark.parametrize("kind", ["baseline", "perceiver"])
def test_every_form_is_read_and_kept_in_memory(kind, widths, tmp_path):
    from visproj import build_projector

    folded = fold(build_projector(kind, *widths).double())
    path = tmp_path / "folded.bin"
    folded.save(path)
    loaded = load_folded(path)
    path.write_bytes(bytes(path.stat().st_size))  # nothing may be mapped from there any more
    x = features(1, 17, widths[0])
    torch.testing.assert_close(loaded(x), folded(x), rtol=1e-13, atol=1e-13)


def test_the_resampler_of_an_encoder_is_read(tmp_path):
    from visproj.qwen_vl import QwenVisionConfig, QwenVisionTransformer

    config = QwenVisionConfig(56, 14, 32, 1, 4, 48, 64, 16, 16)
    pool = QwenVisionTransformer(config).attn_pool
    pool.kv_proj = nn.Linear(32, 64, bias=False)
    fold(pool).save(tmp_path / "folded")
    assert load_folded(tmp_path / "folded").config["out_floor"] is None


def hook(child):
    return lambda p: p.get_submodule(child).register_forward_hook(lambda *given: None)


def replace(child, module):
    def change(projector):
        parent, _, name = child.rpartition(".")
        setattr(projector.get_submodule(parent), name, module)

    return change


REASONS = {
    "backward hook": (
        "baseline",
        lambda p: p[0].register_full_backward_hook(lambda *given: None),
        "cannot fold 0 of LinearProjector: it has backward_hooks",
    ),
    "pre-hook": (
        "vit",
        lambda p: p.vis_layer.mlp.fc1.register_forward_pre_hook(lambda *given: None),
        r"cannot fold vis_layer\.mlp\.fc1 of .*: it has forward_pre_hooks",
    ),
    "hook on the CLIP layer": (
        "vit",
        hook("vis_layer"),
        "vis_layer of .*: it has forward_hooks",
    ),
    "hook on the LayerNorm": ("vit", hook("projection.1"), r"projection\.1 of .* forward_hooks"),
    "replaced forward": (
        "perceiver",
        lambda p: setattr(p.kv_proj, "forward", lambda x: x),
        "cannot fold kv_proj of .*: its forward was replaced",
    ),
    "another attention": (
        "perceiver",
        replace("attn", nn.Identity()),
        "cannot fold attn of .*: it is a torch.nn.modules.linear.Identity",
    ),
    "another CLIP layer": (
        "vit",
        replace("vis_layer", nn.Identity()),
        "fold vis_layer of .*Identity",
    ),
    "three layers": (
        "perceiver",
        lambda p: p.projection.append(nn.GELU()),
        "cannot fold projection of .*: it has 3 children, not 2",
    ),
    "one layer more": (
        "baseline",
        lambda p: p.append(nn.GELU()),
        "cannot fold LinearProjector: it has 3 children, not 2",
    ),
    "no Sequential": (
        "vit",
        replace("projection", nn.Linear(32, 64)),
        "cannot fold projection of .*: it is a torch.nn.modules.linear.Linear",
    ),
    "no weight": (
        "perceiver",
        lambda p: setattr(p.kv_proj, "weight", None),
        "cannot fold kv_proj of .*: it has no weight",
    ),
    "spectral norm": (
        "baseline",
        lambda p: nn.utils.parametrizations.spectral_norm(p[0]),
        "cannot fold 0 of .*: it is a .*ParametrizedLinear",
    ),
    "pruned": (
        "baseline",
        lambda p: prune.random_unstructured(p[0], "weight", 0.5),
        "cannot fold 0 of .*: it has forward_pre_hooks",
    ),
    "no numbers": ("vit", lambda p: p.to("meta"), "is on the device meta"),
}


@pytest.mark.parametrize("case", REASONS)
def test_why_it_cannot_be_folded(case):
    kind, change, message = REASONS[case]
    projector = make(kind)
    change(projector)
    with pytest.raises(InputError, match=message):
        fold(projector)


def test_a_sharded_weight(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        projector = LinearProjector(4, 8)
        mesh = init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(projector[0].weight.data, mesh)
        projector[0].weight = nn.Parameter(sharded)
        with pytest.raises(InputError, match=r"cannot fold 0 of .*: its weight is a DTensor"):
            fold(projector)
    finally:
        dist.destroy_process_group()
