"""What one function of the package writes, the others read or refuse by name."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import VIS_CONFIG, features, make, randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from upstream import KINDS, UpstreamModel
from vlm.tiny import tiny_projector

import visproj
from visproj.errors import InputError, VisprojError
from visproj.projectors import PerceiverProjector, ViTProjector
from visproj.vlm.pretrained import PretrainedProjector

CLIP = {"hidden_act": "gelu", "layer_norm_eps": 1e-3, "attention_dropout": 0.25}
PROJECTORS = {
    "baseline": lambda: make("baseline", 60),
    "vit": lambda: randomise(
        ViTProjector(SimpleNamespace(**{**vars(VIS_CONFIG), "num_attention_heads": 8, **CLIP}), 48)
    ).double(),
    "perceiver": lambda: make("perceiver", 48, query_grid=(2, 3), num_heads=6, has_cls=False),
}


def tokens(kind):
    return features(2, 16 if kind == "perceiver" else 17)


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ""])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind, suffix, tmp_path):
    projector = PROJECTORS[kind]().eval()
    path = tmp_path / f"projector{suffix}"
    visproj.save_projector(projector, path)
    loaded = visproj.load_projector(path)
    assert type(loaded) is type(projector)
    assert repr(loaded) == repr(projector)
    assert same(loaded, projector)
    x = tokens(kind)
    assert torch.equal(loaded(x), projector(x))
    assert {n for n, p in loaded.named_parameters() if not p.requires_grad} == {
        n for n, p in projector.named_parameters() if not p.requires_grad
    }
    path.write_bytes(bytes(path.stat().st_size))  # nothing may be mapped from there any more
    assert torch.equal(loaded(x), projector(x))


def test_what_leaves_no_trace_in_the_weights(tmp_path):
    vit, perceiver = PROJECTORS["vit"](), PROJECTORS["perceiver"]()
    perceiver.attn.dropout = 0.5
    perceiver.projection[0].eps = 1e-6
    visproj.save_projector(vit, tmp_path / "vit")
    visproj.save_projector(perceiver, tmp_path / "perceiver")
    vit, perceiver = (visproj.load_projector(tmp_path / name) for name in ("vit", "perceiver"))
    assert (vit.vis_layer.self_attn.num_heads, vit.vis_layer.self_attn.dropout) == (8, 0.25)
    assert (vit.vis_layer.mlp.hidden_act, vit.vis_layer.layer_norm2.eps) == ("gelu", 1e-3)
    assert vit.projection[1].eps == 1e-12
    assert perceiver.query_grid == (2, 3)
    assert (perceiver.num_heads, perceiver.attn.num_heads, perceiver.has_cls) == (6, 6, False)
    assert (perceiver.attn.dropout, perceiver.projection[0].eps) == (0.5, 1e-6)


def test_the_description(tmp_path):
    visproj.save_projector(make("baseline", dtype=torch.bfloat16), tmp_path / "projector")
    with safe_open(tmp_path / "projector", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "visproj-projector-1"
    assert json.loads(metadata["projector"]) == {
        "kind": "baseline",
        "vis_dim": 32,
        "lang_dim": 64,
        "eps": {"1": 1e-12},
        "dtype": "bfloat16",
    }


def test_dtype_and_device(tmp_path):
    path = tmp_path / "projector"
    visproj.save_projector(make("vit", dtype=torch.bfloat16), path)
    assert visproj.load_projector(path).projection[0].weight.dtype == torch.bfloat16
    assert visproj.load_projector(path, dtype="float32").projection[0].weight.dtype == torch.float32
    with pytest.raises(InputError, match="dtype must be one of"):
        visproj.load_projector(path, dtype=torch.int8)
    with pytest.raises(InputError, match="the device nowhere cannot be used here"):
        visproj.load_projector(path, device="nowhere")
    projector = make("baseline")
    projector[0].bias.data[0] = 1e6
    visproj.save_projector(projector, path)
    with pytest.raises(InputError, match=rf"{path}: 0\.bias holds numbers up to 1e\+06, too large"):
        visproj.load_projector(path, dtype=torch.float16)


WRAPPED = {
    "compiled": torch.compile,
    "in parallel": nn.DataParallel,
    "both": lambda projector: nn.DataParallel(torch.compile(projector)),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrapped_projectors(wrapper, tmp_path):
    projector = make("vit")
    visproj.save_projector(WRAPPED[wrapper](projector), tmp_path / "projector")
    assert same(visproj.load_projector(tmp_path / "projector"), projector)


@pytest.mark.parametrize("form", ["object", "folder", "OUT", "file"])
@pytest.mark.parametrize("kind", KINDS)
def test_pretrained_projectors(kind, form, tmp_path):
    pretrained = tiny_projector(kind)
    path = tmp_path / "OUT" / "projector"
    if form == "object":
        visproj.save_projector(pretrained, path := tmp_path / "projector.safetensors")
    else:
        pretrained.save_pretrained(path)
        path = {"folder": path, "OUT": path.parent, "file": path / "model.safetensors"}[form]
    loaded = visproj.load_projector(path, dtype=torch.float64)
    assert same(loaded, pretrained.module.double())


class Adapter(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_adapter():
    projector = visproj.LinearProjector(3, 4)
    projector[0] = Adapter(3, 4)
    return projector


def without_bias():
    projector = visproj.LinearProjector(3, 4)
    projector[0] = nn.Linear(3, 4, bias=False)
    return projector


@pytest.mark.parametrize("build", [lambda: nn.Linear(3, 4), with_adapter, without_bias])
def test_other_modules_are_written_without_a_description(build, tmp_path):
    module, path = build(), tmp_path / "module.safetensors"
    visproj.save_projector(module, path)
    module.load_state_dict(load_file(path))
    with pytest.raises(InputError, match="holds no projector of format visproj-projector-1"):
        visproj.load_projector(path)


def write_visualchat(path, kind):
    torch.save(UpstreamModel(kind).state_dict(), path)


def write_bare(path, kind):
    save_file({k: v.clone() for k, v in make(kind).state_dict().items()}, path)


FILES = {
    "visualchat": (write_visualchat, "load_visualchat_projector"),
    "projector": (lambda path, kind: visproj.save_projector(make(kind), path), "load_projector"),
    "folded": (lambda path, kind: visproj.fold(make(kind)).save(path), "load_folded"),
    "pretrained": (lambda path, kind: tiny_projector(kind).save_pretrained(path), "load_projector"),
    "bare": (write_bare, "without its description: .*build_projector"),
    "qwen": (
        lambda path, kind: torch.save({"transformer.visual.proj": torch.ones(2)}, path),
        "a Qwen-VL checkpoint: .*extract_vision_encoder",
    ),
    "model": (
        lambda path, kind: save_file({"head": torch.ones(1)}, path),
        "something else, whose first keys are head",
    ),
    "nothing": (lambda path, kind: save_file({}, path), "no tensors"),
}
LOADERS = {
    "load_visualchat_projector": lambda path: visproj.load_visualchat_projector(
        path, vis_config=VIS_CONFIG
    ),
    "load_projector": visproj.load_projector,
    "load_folded": visproj.load_folded,
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", KINDS)
def test_read_wholly_or_refused_with_what_it_holds(kind, file, loader, tmp_path):
    path = tmp_path / ("file.bin" if file in ("visualchat", "qwen") else "file.safetensors")
    write, reader = FILES[file]
    write(path, kind)
    if reader == loader:
        LOADERS[loader](path)
        return
    with pytest.raises(InputError, match=f"(?s){path}.* holds .*{reader}"):
        LOADERS[loader](path)


def test_folders_that_hold_no_projector(tmp_path):
    with pytest.raises(FileNotFoundError, match="has neither"):
        visproj.load_projector(tmp_path)
    visproj.save_projector(make("vit"), tmp_path / "mine.safetensors")
    with pytest.raises(InputError, match=r"the file mine\.safetensors, a projector"):
        visproj.load_projector(tmp_path)
    torch.save(UpstreamModel("vit").state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "mine.safetensors").unlink()
    with pytest.raises(InputError, match="load it with load_visualchat_projector"):
        visproj.load_projector(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="load it with load_visualchat_projector"):
        visproj.load_projector(tmp_path)


def change_description(change):
    def damage(state, metadata):
        description = json.loads(metadata["projector"])
        change(description)
        metadata["projector"] = json.dumps(description)

    return damage


DAMAGE = {
    "another format": (lambda s, m: m.update(format="visproj-projector-9"), "of format"),
    "no description": (lambda s, m: m.pop("projector"), "description of the projector is damaged"),
    "no JSON": (lambda s, m: m.update(projector="{"), "description of the projector is damaged"),
    "a list": (lambda s, m: m.update(projector="[]"), "description of the projector is damaged"),
    "unknown kind": (change_description(lambda d: d.update(kind="__class__")), "unknown kind"),
    "kind of a list": (change_description(lambda d: d.update(kind=[])), "unknown kind"),
    "unknown entry": (change_description(lambda d: d.update(rope=1)), "rope"),
    "missing entry": (change_description(lambda d: d.pop("num_heads")), "num_heads"),
    "missing eps": (change_description(lambda d: d["eps"].pop("ln_q")), "eps must name .*ln_q"),
    "eps of text": (change_description(lambda d: d["eps"].update(ln_q="a")), "eps of ln_q"),
    "width of text": (change_description(lambda d: d.update(vis_dim="32")), "vis_config"),
    "huge width": (change_description(lambda d: d.update(lang_dim=10**30)), "perceiver"),
    "other width": (change_description(lambda d: d.update(vis_dim=31)), r"kv_proj\.weight"),
    "grid": (change_description(lambda d: d.update(query_grid=3)), "perceiver"),
    "heads": (change_description(lambda d: d.update(num_heads=7)), "7 heads do not divide"),
    "CLS": (change_description(lambda d: d.update(has_cls="no")), "has_cls"),
    "dropout": (change_description(lambda d: d.update(dropout=-1)), "dropout"),
    "a key more": (lambda s, m: s.update(lora=torch.ones(1)), "unexpected lora"),
    "a key less": (lambda s, m: s.pop("query"), "missing query"),
    "integers": (
        lambda s, m: s.update(query=torch.ones(256, 64, dtype=torch.int8)),
        "query .*int8",
    ),
    "float8": (lambda s, m: s.update(query=s["query"].to(torch.float8_e4m3fn)), "query .*float8"),
    "placeholders": (lambda s, m: s.update(query=torch.empty(0)), "placeholders"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files(case, tmp_path):
    path = tmp_path / "projector.safetensors"
    visproj.save_projector(make("perceiver"), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    damage, message = DAMAGE[case]
    damage(state, metadata)
    save_file(state, path, metadata)
    with pytest.raises(InputError, match=f"(?s)projector.safetensors.*{message}"):
        visproj.load_projector(path)


STAND_INS = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "page": (b"<!DOCTYPE html>", "web page"),
    "empty": (b"", "is empty"),
    "cut": (b"\x10\0\0\0\0\0\0\0{", "not an intact safetensors file"),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("case", STAND_INS)
def test_stand_ins(case, loader, tmp_path):
    content, message = STAND_INS[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    for source in [path] if loader == "load_folded" else [path, tmp_path]:
        with pytest.raises(VisprojError, match=message):
            LOADERS[loader](source)


WRONG = {
    "None": (None, "got NoneType"),
    "a dict": ({}, "got dict: build the module"),
    "a class": (PerceiverProjector, "got the class PerceiverProjector: pass an instance"),
    "a path": ("projector.safetensors", "got str: load the file first"),
}
TAKES_A_MODULE = {
    "convert": visproj.convert,
    "revert": visproj.revert,
    "fold": visproj.fold,
    "save_projector": lambda module: visproj.save_projector(module, "projector.safetensors"),
    "graphed": lambda module: visproj.graphed(module, torch.ones(1)),
}


@pytest.mark.parametrize("function", TAKES_A_MODULE)
@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_a_module_is_named(case, function):
    given, message = WRONG[case]
    with pytest.raises(TypeError, match=f"{function} takes an nn.Module, {message}"):
        TAKES_A_MODULE[function](given)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(TypeError, match=r"FoldedViT: use its own save\(path\)"):
        visproj.save_projector(make("vit").fold(), tmp_path / "file")
    with pytest.raises(InputError, match="weight is on the device meta"):
        visproj.save_projector(nn.Linear(2, 3, device="meta"), tmp_path / "file")
    with pytest.raises(OSError, match=f"cannot write {tmp_path}"):
        visproj.save_projector(make("vit"), tmp_path)
    assert not list(tmp_path.iterdir())


def edited(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["vision"].update(changes.pop("vision", {}))
    path.write_text(json.dumps(config | changes))


@pytest.mark.parametrize("load", [visproj.load_projector, PretrainedProjector.from_pretrained])
@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("perceiver", {"query_grid": [2, 2]}, r"query_grid \[1, 4\], not \[2, 2\]"),
        ("vit", {"vision": {"num_attention_heads": 2}}, "num_heads 4, not 2"),
        ("vit", {"vision": {"hidden_act": "gelu"}}, "hidden_act quick_gelu, not gelu"),
        ("vit", {"vision": {"layer_norm_eps": 0.5}}, "eps {'vis_layer.layer_norm1': 1e-05"),
    ],
)
def test_a_folder_whose_files_contradict_each_other(load, kind, changes, message, tmp_path):
    """Shapes fit, numbers would not: a configuration that was edited, or another run's weights."""
    options = {"query_grid": (1, 4)} if kind == "perceiver" else {}
    vision = vars(VIS_CONFIG) | {"image_size": 56, "patch_size": 14, "mean": [0], "std": [1]}
    projector = PretrainedProjector(kind, vision, 64, "e", "l", "p", **options)
    projector.save_pretrained(tmp_path)
    load(tmp_path)
    edited(tmp_path, **changes)
    with pytest.raises(InputError, match=f"model.safetensors holds a projector with {message}"):
        load(tmp_path)


def test_a_module_that_the_configuration_does_not_describe(tmp_path):
    vision = vars(VIS_CONFIG) | {"image_size": 56, "patch_size": 14, "mean": [0], "std": [1]}
    projector = PretrainedProjector("perceiver", vision, 64, "e", "l", "p", query_grid=(2, 2))
    projector.module = make("perceiver", dtype=torch.float32, query_grid=(2, 2), num_heads=4)
    with pytest.raises(InputError, match=r"does not describe this module: .*num_heads 4, not 1"):
        projector.save_pretrained(tmp_path / "p")
    projector.module = visproj.fold(projector.module)
    with pytest.raises(TypeError, match="does not take a FoldedPerceiver: use its own save"):
        projector.save_pretrained(tmp_path / "p")
    with pytest.raises(TypeError, match="does not take a FoldedPerceiver: use its own save"):
        visproj.save_projector(projector, tmp_path / "f")
    with pytest.raises(TypeError, match="does not take a FoldedPerceiver: use its own save"):
        visproj.save_projector(torch.compile(projector.module), tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_a_replaced_forward_of_a_module_itself_is_not_described(tmp_path):
    projector = make("baseline")
    projector[0].forward = lambda x: torch.zeros(*x.shape[:-1], 64, dtype=x.dtype)
    visproj.save_projector(projector, tmp_path / "f")
    with pytest.raises(InputError, match="without its description"):
        visproj.load_projector(tmp_path / "f")


def test_a_newer_format_is_named(tmp_path):
    save_file({"0.weight": torch.zeros(2, 2)}, tmp_path / "f", {"format": "visproj-projector-2"})
    with pytest.raises(InputError, match="format visproj-projector-2, which a newer visproj reads"):
        visproj.load_projector(tmp_path / "f")
