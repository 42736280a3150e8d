import os
from dataclasses import replace

import pytest
import torch
from qwen_vl.checkpoints import (
    BLOCK,
    CONFIG,
    FORMATS,
    PREFIX,
    full_state,
    shard_name,
    snapshot,
    visual_tensors,
    write_checkpoint,
)
from safetensors import safe_open

from visproj.errors import InputError
from visproj.qwen_vl import QwenVisionTransformer, extract_vision_encoder, merge_into
from visproj.qwen_vl import merge as merge_module


def read_all(folder):
    """Every tensor of a checkpoint and the shard it is in."""
    tensors = {}
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert file.metadata() == {"format": "pt"}
                tensors |= {key: (path.name, file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
        elif path.suffix == ".bin":
            state = torch.load(path, weights_only=True)
            tensors |= {key: (path.name, tensor) for key, tensor in state.items()}
    return tensors


def trained_encoder(folder, config=CONFIG, seed=1):
    encoder = QwenVisionTransformer(config)
    encoder.load_state_dict(visual_tensors(config, seed=seed))
    encoder.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shards", "index"), [(1, False), (2, True), (4, True), (4, False)], ids=str
)
@pytest.mark.parametrize("format", FORMATS)
def test_only_the_encoder_changes(tmp_path, format, shards, index, dtype):
    state = full_state(dtype=dtype)
    source = write_checkpoint(tmp_path / "full", format, shards, index, state)
    (source / "tokenizer").mkdir()
    (source / "tokenizer" / "vocab.tiktoken").write_text("words")
    before = snapshot(source)
    encoder = trained_encoder(tmp_path / "encoder")
    assert merge_into(source, encoder, tmp_path / "merged") == tmp_path / "merged"

    assert snapshot(source) == before
    merged, original = read_all(tmp_path / "merged"), read_all(source)
    assert merged.keys() == original.keys()
    trained = visual_tensors(seed=1)
    for key, (shard, tensor) in merged.items():
        name = key.removeprefix(PREFIX)
        expected = trained[name].to(dtype) if name in trained else state[key]
        assert shard == original[key][0]
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected), key
    others = {name for name in before if not name.endswith((".bin", ".safetensors"))}
    after = snapshot(tmp_path / "merged")
    assert after.keys() == before.keys()
    assert {name: after[name] for name in others} == {name: before[name] for name in others}


def test_extracting_what_was_merged_gives_the_encoder_back(tmp_path):
    source = write_checkpoint(tmp_path / "full")
    encoder = trained_encoder(tmp_path / "encoder")
    merge_into(source, encoder, tmp_path / "merged")
    extract_vision_encoder(tmp_path / "merged", tmp_path / "again")
    assert snapshot(tmp_path / "again") == snapshot(encoder)


@pytest.mark.parametrize("format", FORMATS)
def test_merging_the_checkpoints_own_encoder_changes_nothing(tmp_path, format):
    source = write_checkpoint(tmp_path / "full", format)
    extract_vision_encoder(source, tmp_path / "encoder")
    merge_into(source, tmp_path / "encoder", tmp_path / "merged")
    for key, (shard, tensor) in read_all(tmp_path / "merged").items():
        assert (shard, tensor.tolist()) == (shard, read_all(source)[key][1].tolist())
    if format == "safetensors":
        assert snapshot(tmp_path / "merged") == snapshot(source)


@pytest.mark.parametrize("linkable", [True, False])
def test_language_shards_are_linked_or_copied_unread(tmp_path, monkeypatch, linkable):
    source = write_checkpoint(tmp_path / "full")
    name = shard_name("safetensors", 1, 4)
    (source / name).write_bytes(b"not a tensor in here")
    if not linkable:

        def refuse(*arguments):
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(merge_module.os, "link", refuse)
    merge_into(source, trained_encoder(tmp_path / "encoder"), tmp_path / "merged")
    assert os.path.samefile(source / name, tmp_path / "merged" / name) == linkable
    assert (tmp_path / "merged" / name).read_bytes() == b"not a tensor in here"
    boundary = shard_name("safetensors", 2, 4)
    assert not os.path.samefile(source / boundary, tmp_path / "merged" / boundary)


def test_a_snapshot_of_links(tmp_path):
    """The hub's cache holds links to files elsewhere."""
    blobs = write_checkpoint(tmp_path / "blobs")
    source = tmp_path / "snapshot"
    source.mkdir()
    for path in blobs.iterdir():
        (source / path.name).symlink_to(path)
    before = snapshot(blobs)
    merge_into(source, trained_encoder(tmp_path / "encoder"), tmp_path / "merged")
    assert snapshot(blobs) == before
    assert not any(path.is_symlink() for path in (tmp_path / "merged").iterdir())
    extract_vision_encoder(tmp_path / "merged", tmp_path / "again")
    assert snapshot(tmp_path / "again") == snapshot(tmp_path / "encoder")


def test_destination_inside_the_checkpoint(tmp_path):
    source = write_checkpoint(tmp_path / "full")
    files = set(snapshot(source))
    merge_into(source, trained_encoder(tmp_path / "encoder"), source / "merged")
    assert set(snapshot(source / "merged")) == files


def test_wrapped_and_parameter_checkpoint(tmp_path):
    """Keys behind ``module.``, and a ``.bin`` of parameters, keep both."""
    state = full_state(prefix=f"module.{PREFIX}")
    parameters = {key: torch.nn.Parameter(tensor) for key, tensor in state.items()}
    source = write_checkpoint(tmp_path / "full", "bin", state=parameters)
    merge_into(source, trained_encoder(tmp_path / "encoder"), tmp_path / "merged")
    merged = read_all(tmp_path / "merged")
    assert all(isinstance(tensor, torch.nn.Parameter) for _, tensor in merged.values())
    got = merged[f"module.{PREFIX}conv1.weight"][1]
    assert torch.equal(got, visual_tensors(seed=1)["conv1.weight"])


@pytest.mark.parametrize("block", [BLOCK, None], ids=["described", "assumed"])
def test_encoder_of_another_architecture(tmp_path, block):
    source = write_checkpoint(tmp_path / "full", block=block)
    other = trained_encoder(tmp_path / "encoder", replace(CONFIG, mlp_width=40))
    with pytest.raises(ValueError, match=r"c_fc\.weight \[40, 32\], not \[157, 32\]"):
        merge_into(source, other, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_encoder_with_other_heads(tmp_path):
    """Shapes do not tell the heads: only a checkpoint that states them can be contradicted."""
    encoder = trained_encoder(tmp_path / "encoder", replace(CONFIG, heads=4))
    with pytest.raises(ValueError, match=r"the encoder has 4 heads, but .* encoder has 16"):
        merge_into(write_checkpoint(tmp_path / "full"), encoder, tmp_path / "merged")
    assumed = write_checkpoint(tmp_path / "assumed", block=None)
    merge_into(assumed, encoder, tmp_path / "merged")


def test_refusals_leave_nothing(tmp_path, monkeypatch):
    source = write_checkpoint(tmp_path / "full")
    encoder = trained_encoder(tmp_path / "encoder")
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError):
        merge_into(source, encoder, encoder)
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        merge_into(tmp_path / "nowhere", encoder, tmp_path / "merged")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        merge_into(source, tmp_path / "nowhere", tmp_path / "merged")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge_module.shutil, "copyfile", full)
    with pytest.raises(OSError, match=r"cannot write .*merged: No space left on device"):
        merge_into(source, encoder, tmp_path / "merged")
    assert snapshot(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder", "full"]


def test_overflow_into_the_checkpoints_dtype(tmp_path):
    source = write_checkpoint(tmp_path / "full", state=full_state(dtype=torch.float16))
    encoder = QwenVisionTransformer(CONFIG)
    with torch.no_grad():
        encoder.ln_post.bias[0] = 1e6
    encoder.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"ln_post\.bias holds numbers up to 1e\+06, too large"):
        merge_into(source, tmp_path / "encoder", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_only_weights_share_storage_with_the_source(tmp_path):
    """Editing a file of the merged checkpoint must not edit the source's, or the hub's blob."""
    blobs = write_checkpoint(tmp_path / "blobs")
    (blobs / "tokenizer.json").write_text("{}")
    (blobs / "more").mkdir()
    (blobs / "more" / "notes.txt").write_text("source")
    for path in blobs.rglob("*"):
        if path.is_file():
            path.chmod(0o444)
    source = tmp_path / "snapshot"
    source.mkdir()
    for path in blobs.iterdir():
        (source / path.name).symlink_to(path)
    before = snapshot(blobs)
    merge_into(source, trained_encoder(tmp_path / "encoder"), tmp_path / "merged")
    for path in (tmp_path / "merged").rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert path.stat().st_nlink == 1
            path.write_text("edited")
    assert (tmp_path / "merged" / "more" / "notes.txt").read_text() == "edited"
    assert snapshot(blobs) == before


def test_a_folder_linked_into_itself(tmp_path):
    source = write_checkpoint(tmp_path / "full")
    names = {path.name for path in source.iterdir()}
    (source / "again").symlink_to(source)
    merge_into(source, trained_encoder(tmp_path / "encoder"), tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names


@pytest.mark.parametrize("format", FORMATS)
def test_a_compiled_child(tmp_path, format):
    state = {
        key.replace("visual.transformer.", "visual.transformer._orig_mod."): tensor
        for key, tensor in full_state().items()
    }
    source = write_checkpoint(tmp_path / "full", format, state=state)
    encoder = trained_encoder(tmp_path / "encoder")
    merge_into(source, encoder, tmp_path / "merged")
    assert read_all(tmp_path / "merged").keys() == state.keys()
    extract_vision_encoder(tmp_path / "merged", tmp_path / "again")
    assert snapshot(tmp_path / "again") == snapshot(encoder)


@pytest.mark.parametrize("first", FORMATS)
def test_an_encoder_in_both_formats(tmp_path, first):
    """The one that is not rewritten would stay the old one, without a word."""
    source = tmp_path / "full"
    for format in FORMATS:
        write_checkpoint(source, format, 4 if format == first else 1, index=True)
    before = snapshot(source)
    with pytest.raises(InputError, match=r"pytorch_model.*bin holds the encoder a second time"):
        merge_into(source, trained_encoder(tmp_path / "encoder"), tmp_path / "merged")
    assert snapshot(source) == before
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "training_args.bin", "rng_state.pth", "a.gguf"])
def test_what_is_no_shard_is_copied(tmp_path, name):
    source = write_checkpoint(tmp_path / "full")
    (source / name).write_bytes(b"source")
    merge_into(source, trained_encoder(tmp_path / "encoder"), tmp_path / "merged")
    assert (tmp_path / "merged" / name).stat().st_nlink == 1
    (tmp_path / "merged" / name).write_bytes(b"edited")
    assert (source / name).read_bytes() == b"source"
