"""Projectors out of DeepSpeed-VisualChat checkpoints, and saved by themselves."""

import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from helpers import VIS_CONFIG, features, make
from safetensors.torch import load_file, save_file
from torch import nn
from training_engines import partition
from upstream import KINDS, UpstreamModel

import visproj
from visproj.errors import InputError
from visproj.positions import sincos_position_table


def save(state, path):
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


def write_single(state, folder, suffix):
    path = folder / ("model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin")
    save(state, path)
    return path


def write_sharded(state, folder, suffix):
    """Every third key into one of three shards, the last of which never arrives."""
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    shards = {key: f"{stem}-{i % 2}{suffix}" for i, key in enumerate(state)}
    for name in set(shards.values()):
        save({key: state[key] for key in state if shards[key] == name}, folder / name)
    shards["lang_decoder.away"] = f"{stem}-2{suffix}"
    index = f"{'model.safetensors' if suffix == '.safetensors' else 'pytorch_model.bin'}.index.json"
    (folder / index).write_text(json.dumps({"weight_map": shards}))


def checkpoint_state(kind, dtype=torch.float64):
    return {key: value.clone() for key, value in UpstreamModel(kind).to(dtype).state_dict().items()}


def options(kind):
    return {
        "baseline": {},
        "vit": {"vis_config": SimpleNamespace(**vars(VIS_CONFIG))},
        "perceiver": {"num_heads": 2},
    }[kind]


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("form", ["file", "directory", "shards"])
@pytest.mark.parametrize("kind", KINDS)
def test_loads(kind, form, suffix, tmp_path):
    folder = tmp_path / "epoch-0"
    folder.mkdir()
    model = UpstreamModel(kind)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    path = folder
    if form == "shards":
        write_sharded(state, folder, suffix)
    elif form == "directory":
        write_single(state, folder, suffix)
    else:
        path = write_single(state, folder, suffix)
    projector = visproj.load_visualchat_projector(path, **options(kind))
    for file in folder.iterdir():  # nothing may be mapped from there any more
        with file.open("r+b") as stream:
            stream.write(bytes(file.stat().st_size))
    x = features(2, 17)
    # Both forms are fp64 chains of a dozen products.
    torch.testing.assert_close(projector(x), model.projection(x), rtol=1e-10, atol=1e-10)
    frozen = {name for name, p in projector.named_parameters() if not p.requires_grad}
    assert frozen == ({"pos_embed"} if kind == "perceiver" else set())
    assert projector.training


def test_dtype_and_default_heads(tmp_path):
    path = write_single(checkpoint_state("perceiver", torch.bfloat16), tmp_path, ".bin")
    projector = visproj.load_visualchat_projector(path)
    assert {p.dtype for p in projector.parameters()} == {torch.bfloat16}
    assert projector.num_heads == 1
    assert projector.query_grid == (4, 4)


def without(key):
    def change(state):
        del state[key]

    return change


def of_another_shape(key, *shape):
    def change(state):
        state[key] = torch.zeros(*shape)

    return change


DAMAGED = {
    "no projection": (
        "baseline",
        lambda state: [state.pop(key) for key in list(state) if key.startswith("projection.")],
        r"no keys that begin with 'projection\.'.* first keys are lang_decoder\.0\.bias",
    ),
    "a missing key": (
        "perceiver",
        without("projection.ln_q.bias"),
        r'under projection: .*Missing key.*"ln_q\.bias"',
    ),
    "a missing width": ("perceiver", without("projection.kv_proj.weight"), "no matrix kv_proj"),
    "no queries": ("perceiver", without("projection.query"), "no matrix query; the keys are"),
    "no baseline": ("baseline", without("projection.0.weight"), r"no matrix 0\.weight; the keys"),
    "one key more": (
        "baseline",
        of_another_shape("projection.0.lora_A", 2, 2),
        r'Unexpected key.*"0\.lora_A"',
    ),
    "a shape": (
        "vit",
        of_another_shape("projection.vis_layer.mlp.fc1.bias", 5),
        r"size mismatch for vis_layer\.mlp\.fc1\.bias.*\[5\].*\[48\]",
    ),
    "no matrix": ("baseline", of_another_shape("projection.0.weight", 5), r"no matrix 0\.weight"),
    "integers": (
        "baseline",
        lambda state: state.update({"projection.0.bias": torch.zeros(64, dtype=torch.int8)}),
        r"projection\.0\.bias in .* must be a plain tensor of float64",
    ),
    "no tensor": (
        "baseline",
        lambda state: state.update({"projection.0.bias": [1.0]}),
        r"projection\.0\.bias in .* is a list, not a tensor",
    ),
    "float8": (
        "baseline",
        lambda state: state.update(
            {"projection.0.bias": torch.zeros(64, dtype=torch.float8_e4m3fn)}
        ),
        r"projection\.0\.bias in .* must be a plain tensor of float64",
    ),
    "nothing": ("baseline", lambda state: state.clear(), "It holds no tensors"),
    "queries": (
        "perceiver",
        of_another_shape("projection.query", 12, 64),
        "12 queries form no square grid, and pos_embed is not the sine-cosine table of another",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_wrong_is_named(case, tmp_path):
    kind, damage, message = DAMAGED[case]
    state = checkpoint_state(kind)
    damage(state)
    path = write_single(state, tmp_path, ".bin")
    for source in (path, tmp_path):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            visproj.load_visualchat_projector(source, **options(kind))


def test_a_vit_projector_asks_for_its_configuration(tmp_path):
    path = write_single(checkpoint_state("vit"), tmp_path, ".safetensors")
    with pytest.raises(ValueError, match=r"pass the vision encoder's configuration as vis_config"):
        visproj.load_visualchat_projector(path)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        visproj.load_visualchat_projector(tmp_path / "absent.bin")
    with pytest.raises(FileNotFoundError, match="has neither"):
        visproj.load_visualchat_projector(tmp_path)


def test_pickled_code_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return exec, ("raise AssertionError('was executed')",)

    path = tmp_path / "pytorch_model.bin"
    torch.save({"projection.0.weight": Bomb()}, path, pickle_module=pickle)
    with pytest.raises(ValueError, match=r"not loaded, and nothing in it was executed"):
        visproj.load_visualchat_projector(path)


WRAPPERS = {
    "DDP": "module.{}",
    "torch.compile": "_orig_mod.{}",
    "PEFT": "base_model.model.{}",
    "transformers": "model.{}",
    "all of them": "module.base_model.model.model._orig_mod.{}",
    "FSDP": "_fsdp_wrapped_module.{}",
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", KINDS)
def test_prefixes_of_wrappers_are_left_out(kind, wrapper, tmp_path):
    state = checkpoint_state(kind)
    wrapped = {WRAPPERS[wrapper].format(key): value for key, value in state.items()}
    write_sharded(wrapped, tmp_path, ".bin")
    loaded = visproj.load_visualchat_projector(tmp_path, **options(kind)).state_dict()
    wanted = {key: value for key, value in state.items() if key.startswith("projection.")}
    assert {f"projection.{key}" for key in loaded} == wanted.keys()
    assert all(torch.equal(loaded[key.removeprefix("projection.")], wanted[key]) for key in wanted)


def test_a_compiled_child(tmp_path):
    model = UpstreamModel("vit")
    model.projection.vis_layer = torch.compile(model.projection.vis_layer)
    path = write_single(model.state_dict(), tmp_path, ".bin")
    loaded = visproj.load_visualchat_projector(path, **options("vit"))
    assert torch.equal(
        loaded.vis_layer.mlp.fc1.weight, model.projection.vis_layer._orig_mod.mlp.fc1.weight
    )


def test_one_name_behind_two_prefixes(tmp_path):
    state = checkpoint_state("baseline")
    state["module.projection.0.weight"] = torch.zeros(64, 32)
    path = write_single(state, tmp_path, ".bin")
    with pytest.raises(InputError, match=r"holds projection\.0\.weight twice"):
        visproj.load_visualchat_projector(path)


@pytest.mark.parametrize("source", ["file", "folder"])
@pytest.mark.parametrize("kind", KINDS)
def test_placeholders_of_zero_3(kind, source, tmp_path):
    empty = {key: torch.empty(0) for key in checkpoint_state(kind)}
    path = write_single(empty, tmp_path, ".bin")
    with pytest.raises(InputError, match=r"placeholders of shape \[0\] .*zero_to_fp32\.py"):
        visproj.load_visualchat_projector(path if source == "file" else tmp_path, **options(kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_positions_that_zero_3_does_not_save(dtype, tmp_path):
    """DeepSpeed-VisualChat loads its checkpoints with strict=False for this."""
    model = UpstreamModel("perceiver").to(dtype)
    table = sincos_position_table(64, (4, 4)).to(dtype)
    state = {k: v.clone() for k, v in model.state_dict().items() if k != "projection.pos_embed"}
    path = write_single(state, tmp_path, ".bin")
    with pytest.warns(UserWarning, match=r"no projection\.pos_embed, .* table was computed"):
        loaded = visproj.load_visualchat_projector(path, num_heads=2)
    assert torch.equal(loaded.pos_embed, table)
    assert not loaded.pos_embed.requires_grad
    model.projection.pos_embed.data = table
    loaded.double(), model.double()
    x = features(2, 17)
    torch.testing.assert_close(loaded(x), model.projection(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind, tmp_path):
    projector = make(kind)
    path = tmp_path / "projector.safetensors"
    path.write_text("something older")
    visproj.save_projector(projector, path)
    other = make(kind)
    other.load_state_dict(load_file(path))
    x = features(1, 17)
    assert torch.equal(other(x), projector(x))
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "projector.safetensors"
    path.write_text("something older")

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr("visproj.files.tensor_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        visproj.save_projector(make("baseline"), path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "something older"


def test_a_quantised_projector_is_refused(tmp_path):
    projector = make("baseline")
    projector[0].weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"dtype must be one of .*got torch\.int8"):
        visproj.save_projector(projector, tmp_path / "projector.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def one_process(tmp_path):
    """A process group of one, whose rank a test may change."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_zero_3_is_gathered(kind, tmp_path, monkeypatch):
    projector = make(kind)
    wanted = {key: value.clone() for key, value in projector.state_dict().items()}
    partition(projector, monkeypatch)
    path = tmp_path / "projector.safetensors"
    visproj.save_projector(projector, path)
    assert all(p.numel() == 0 for p in projector.parameters()), "back in pieces"
    saved = load_file(path)
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[key], wanted[key]) for key in wanted)


def test_only_rank_0_writes(tmp_path, monkeypatch, one_process):
    monkeypatch.setattr(one_process, "get_rank", lambda: 1)
    visproj.save_projector(make("baseline"), tmp_path / "projector.safetensors")
    assert not (tmp_path / "projector.safetensors").exists()


def test_fsdp2_is_put_together(tmp_path, one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    projector = make("perceiver")
    wanted = {key: value.clone() for key, value in projector.state_dict().items()}
    fully_shard(projector, mesh=init_device_mesh("cpu", (1,)))
    assert all(isinstance(p, DTensor) for p in projector.parameters())
    path = tmp_path / "projector.safetensors"
    visproj.save_projector(projector, path)
    saved = load_file(path)
    assert all(torch.equal(saved[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grid", [(2, 8), (8, 2), (4, 4), (3, 5), (1, 7)], ids=str)
def test_the_grid_of_the_queries_is_that_of_the_table(grid, dtype, tmp_path):
    projector = make("perceiver", dtype=dtype, query_grid=grid, num_heads=2)
    save({f"projection.{k}": t for k, t in projector.state_dict().items()}, tmp_path / "f.bin")
    loaded = visproj.load_visualchat_projector(tmp_path / "f.bin", num_heads=2)
    assert loaded.query_grid == grid
    x = features(2, 17).to(dtype)
    assert torch.equal(loaded(x), projector(x))


def test_a_table_of_no_grid_is_taken_for_a_square_one(tmp_path):
    """As one that was trained, which nothing tells the grid of."""
    state = make("perceiver", query_grid=(4, 4), num_heads=2).state_dict()
    state["pos_embed"] = torch.randn_like(state["pos_embed"])
    save({f"projection.{k}": t for k, t in state.items()}, tmp_path / "f.bin")
    loaded = visproj.load_visualchat_projector(tmp_path / "f.bin", num_heads=2)
    assert loaded.query_grid == (4, 4)
    assert torch.equal(loaded.pos_embed, state["pos_embed"])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
def test_a_table_of_integers_is_one_line(dtype, tmp_path):
    state = make("perceiver", query_grid=(2, 8), num_heads=2).state_dict()
    state["pos_embed"] = torch.ones_like(state["pos_embed"], dtype=dtype)
    save({f"projection.{k}": t for k, t in state.items()}, tmp_path / "f.bin")
    with pytest.raises(InputError, match=r"pos_embed|plain floating tensor"):
        visproj.load_visualchat_projector(tmp_path / "f.bin", num_heads=2)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("baseline", {"vis_config": 99}, "width of 99, but the projector takes a width of 32"),
        ("perceiver", {"vis_config": 99}, "width of 99, but the projector takes a width of 32"),
        ("baseline", {"num_heads": 2}, "num_heads applies only to a Perceiver"),
        ("vit", {"num_heads": 2}, "num_heads applies only to a Perceiver"),
    ],
)
def test_arguments_that_contradict_the_file(kind, given, message, tmp_path):
    path = write_single(checkpoint_state(kind), tmp_path, ".bin")
    with pytest.raises(InputError, match=message):
        visproj.load_visualchat_projector(path, **given)


def test_a_projector_twice(tmp_path):
    state = checkpoint_state("perceiver")
    save(state | {"query": state["projection.query"].clone()}, tmp_path / "f.bin")
    with pytest.raises(InputError, match=r"keys under projection\. and also keys .*\(query\)"):
        visproj.load_visualchat_projector(tmp_path / "f.bin")
