"""One clear error for every kind of damage, and a destination that nothing has touched."""

import json
import os
import struct
from collections import OrderedDict

import pytest
import torch
from qwen_vl.checkpoints import (
    BLOCK,
    CONFIG,
    FORMATS,
    PREFIX,
    full_state,
    save_shard,
    shard_name,
    snapshot,
    visual_tensors,
    write_checkpoint,
)
from safetensors.torch import save_file

from visproj.qwen_vl import QwenVisionTransformer, extract_vision_encoder

CASES = {}


def case(message, error=ValueError, formats=FORMATS):
    """Register a way to damage a checkpoint of four shards (2 to 4 hold visual tensors)."""

    def register(damage):
        for format in formats:
            CASES[f"{damage.__name__}-{format}"] = (damage, format, error, message)
        return damage

    return register


def shard(folder, format, number=3):
    return folder / shard_name(format, number, 4)


def index_of(folder, format):
    path = folder / f"{shard_name(format)}.index.json"
    return path, json.loads(path.read_text())


def reload_state(folder, format, change, **options):
    """Write the checkpoint again with some of its tensors changed."""
    state = full_state()
    change(state)
    write_checkpoint(folder, format, state=state, **options)


@case(r"no keys that contain 'visual'.*transformer\.wte\.weight, transformer\.h\.0")
def no_visual_keys(folder, format):
    def drop(state):
        for key in [key for key in state if "visual" in key]:
            del state[key]

    for path in folder.iterdir():
        path.unlink()
    reload_state(folder, format, drop, shards=2)


@case(r"no keys that contain 'visual'.*lm_head\.weight, transformer\.h\.0")
def no_visual_keys_in_one_file(folder, format):
    for path in folder.iterdir():
        path.unlink()
    state = {key: value for key, value in full_state().items() if "visual" not in key}
    write_checkpoint(folder, format, shards=1, state=state)


@case(r"holds placeholders of shape \[0\] .*zero_to_fp32\.py")
def placeholders_of_zero_3(folder, format):
    def empty(state):
        state.update({key: torch.empty(0) for key in state})

    reload_state(folder, format, empty, block=None)


@case(r"-00003-of-00004.* is a web page")
def a_page_in_place_of_a_shard(folder, format):
    shard(folder, format).write_bytes(b"<!doctype html>")


@case(r"lacks the file .*-00003-of-00004", FileNotFoundError)
def index_names_missing_shard(folder, format):
    shard(folder, format).unlink()


@case(r"the index says that .* holds .*, which it does not")
def index_names_missing_key(folder, format):
    path, index = index_of(folder, format)
    index["weight_map"][f"{PREFIX}transformer.resblocks.2.ln_1.weight"] = shard(folder, format).name
    path.write_text(json.dumps(index))


@case(r"00003-of-00004.* holds .*, which the index does not name")
def index_leaves_a_key_out(folder, format):
    path, index = index_of(folder, format)
    name = shard(folder, format).name
    key = next(key for key, shard in index["weight_map"].items() if shard == name)
    del index["weight_map"][key]
    path.write_text(json.dumps(index))


@case(r"index\.json is not valid JSON")
def index_is_cut_off(folder, format):
    path, _ = index_of(folder, format)
    path.write_bytes(path.read_bytes()[:200])


@case(r"index\.json holds a list, not an object")
def index_is_a_list(folder, format):
    index_of(folder, format)[0].write_text("[]")


@case(r"index\.json has no weight_map")
def index_without_map(folder, format):
    index_of(folder, format)[0].write_text("{}")


@case(r"which is not a shard's name")
def index_points_outside(folder, format):
    path, index = index_of(folder, format)
    index["weight_map"][f"{PREFIX}conv1.weight"] = f"../full/{shard(folder, format).name}"
    path.write_text(json.dumps(index))


@case(r"maps .* to 7, which is not a shard's name")
def index_holds_a_number(folder, format):
    path, index = index_of(folder, format)
    index["weight_map"][f"{PREFIX}conv1.weight"] = 7
    path.write_text(json.dumps(index))


@case(r"has neither model\.safetensors nor pytorch_model\.bin", FileNotFoundError)
def no_weights(folder, format):
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()


@case(r"is not an intact safetensors file", formats=["safetensors"])
def truncated_header(folder, format):
    path = shard(folder, format)
    path.write_bytes(path.read_bytes()[:100])


@case(r"is not an intact safetensors file", formats=["safetensors"])
def truncated_data(folder, format):
    path = shard(folder, format)
    path.write_bytes(path.read_bytes()[:-1])


@case(r"is not an intact safetensors file", formats=["safetensors"])
def header_longer_than_the_file(folder, format):
    path = shard(folder, format)
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


@case(r"is not an intact safetensors file", formats=["safetensors"])
def header_is_noise(folder, format):
    path = shard(folder, format)
    content = bytearray(path.read_bytes())
    content[8:60] = b"\xff" * 52
    path.write_bytes(content)


@case(r"is not an intact safetensors file", formats=["safetensors"])
def overlapping_offsets(folder, format):
    path = shard(folder, format)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for entry in header.values():
        if "data_offsets" in entry:
            entry["data_offsets"][0] = 0
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


@case(r"is truncated, or was written by torch\.save before", formats=["bin"])
def truncated_bin(folder, format):
    path = shard(folder, format)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@case(r"is truncated, or was written by torch\.save before", formats=["bin"])
def older_bin_format(folder, format):
    torch.save(visual_tensors(), shard(folder, format), _use_new_zipfile_serialization=False)


@case(r"is damaged", formats=["bin"])
def bin_whose_pickle_is_noise(folder, format):
    path = shard(folder, format)
    content = bytearray(path.read_bytes())
    at = content.index(b"data.pkl") + 200
    content[at : at + 300] = bytes(range(1, 101)) * 3
    path.write_bytes(content)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trap",)


@case(r"holds pickled objects that are not tensors.*not loaded, and nothing in it", formats=["bin"])
def bin_that_runs_code(folder, format):
    torch.save({**visual_tensors(), "extra": Trap()}, shard(folder, format))


@case(r"holds pickled objects that are not tensors \(visproj\.qwen_vl\.model\.", formats=["bin"])
def bin_of_a_whole_module(folder, format):
    torch.save(QwenVisionTransformer(CONFIG), shard(folder, format))


@case(r"holds a list, not a dict of named tensors", formats=["bin"])
def bin_of_a_list(folder, format):
    torch.save(list(visual_tensors().values()), shard(folder, format))


@case(r"holds a dict, not a dict of named tensors", formats=["bin"])
def bin_with_numbered_keys(folder, format):
    torch.save(dict(enumerate(visual_tensors().values())), shard(folder, format))


def change_in_shard(folder, name, value):
    """Replace one visual tensor in the ``.bin`` shard that holds it."""
    _, index = index_of(folder, "bin")
    target = folder / index["weight_map"][PREFIX + name]
    state = torch.load(target, weights_only=True)
    state[PREFIX + name] = value
    torch.save(OrderedDict(state), target)


@case(r"ln_post\.bias in .* is a str, not a tensor", formats=["bin"])
def bin_with_a_word_for_a_tensor(folder, format):
    change_in_shard(folder, "ln_post.bias", "zeros")


@case(r"ln_post\.bias in .* must be a plain tensor of .*, got a torch\.sparse_coo", formats=["bin"])
def bin_with_a_sparse_tensor(folder, format):
    change_in_shard(folder, "ln_post.bias", torch.zeros(CONFIG.output_dim).to_sparse())


@case(r"ln_post\.bias in .* must be a plain tensor .* on meta", formats=["bin"])
def bin_with_a_tensor_without_data(folder, format):
    change_in_shard(folder, "ln_post.bias", torch.zeros(CONFIG.output_dim, device="meta"))


@case(r"ln_post\.bias in .* must be a plain tensor of .* of torch\.int64")
def integer_tensor(folder, format):
    def change(state):
        state[f"{PREFIX}ln_post.bias"] = torch.zeros(CONFIG.output_dim, dtype=torch.int64)

    reload_state(folder, format, change)


@case(r"of another shape conv1\.weight \[32, 3, 7, 7\], not \[32, 3, 14, 14\]")
def unexpected_shape(folder, format):
    def change(state):
        state[f"{PREFIX}conv1.weight"] = torch.zeros(32, 3, 7, 7)

    reload_state(folder, format, change)


@case(r"missing transformer\.resblocks\.1\.ln_2\.bias \[32\]$")
def missing_tensor(folder, format):
    reload_state(folder, format, lambda s: s.pop(f"{PREFIX}transformer.resblocks.1.ln_2.bias"))


@case(r"unexpected visual\.merger\.weight \[4\]$")
def unexpected_tensor(folder, format):
    def change(state):
        state["visual.merger.weight"] = torch.ones(4)

    reload_state(folder, format, change)


@case(r"holds ln_post\.bias twice, once as module\.transformer\.visual\.ln_post\.bias")
def one_tensor_under_two_prefixes(folder, format):
    def change(state):
        state[f"module.{PREFIX}ln_post.bias"] = state[f"{PREFIX}ln_post.bias"].clone()

    reload_state(folder, format, change)


@case(r"is in both .*-00003-of-00004.* and .*-00004-of-00004")
def one_tensor_in_two_shards(folder, format):
    index_of(folder, format)[0].unlink()
    key = f"{PREFIX}transformer.resblocks.1.mlp.c_proj.bias"
    save_shard({key: torch.zeros(CONFIG.width)}, shard(folder, format, 3))


@case(r"missing .*ln_pre.* and \d+ more")
def shard_left_out_of_a_directory_without_index(folder, format):
    index_of(folder, format)[0].unlink()
    shard(folder, format, 2).unlink()
    shard(folder, format, 3).unlink()


@case(r"is a Git LFS pointer")
def git_lfs_pointer(folder, format):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9963750854\n"
    shard(folder, format).write_text(text)


@case(r"is empty: download it again")
def empty_shard(folder, format):
    shard(folder, format).write_bytes(b"")


def change_block(folder, change):
    (folder / "config.json").write_text(json.dumps({"visual": {**BLOCK, **change}}))


@case(r"config\.json is not valid JSON")
def config_is_cut_off(folder, format):
    (folder / "config.json").write_text('{"visual": {')


@case(r"visual in config\.json is a list, not an object")
def visual_block_is_a_list(folder, format):
    (folder / "config.json").write_text('{"visual": [448]}')


@case(r"the visual block lacks layers, mlp_ratio")
def visual_block_is_incomplete(folder, format):
    block = {key: value for key, value in BLOCK.items() if key not in ("layers", "mlp_ratio")}
    (folder / "config.json").write_text(json.dumps({"visual": block}))


@case(r"width and mlp_ratio must be numbers, got 32 and nan")
def visual_block_with_nan(folder, format):
    change_block(folder, {"mlp_ratio": float("nan")})


@case(r"heads must be a positive int, got '16'")
def visual_block_with_a_word(folder, format):
    change_block(folder, {"heads": "16"})


@case(r"missing transformer\.resblocks\.2\.ln_1\.weight \[32\]")
def visual_block_of_a_deeper_model(folder, format):
    change_block(folder, {"layers": 3})


@case(r"of another shape .*mlp\.c_fc\.weight \[157, 32\], not \[128, 32\]")
def visual_block_of_another_width(folder, format):
    change_block(folder, {"mlp_ratio": 4.0})


@case(r"cannot determine the architecture without conv1\.weight")
def neither_block_nor_first_tensor(folder, format):
    reload_state(folder, format, lambda s: s.pop(f"{PREFIX}conv1.weight"), block=None)


@case(r"heads 16 do not divide width 24")
def shapes_that_16_heads_do_not_divide(folder, format):
    def change(state):
        state[f"{PREFIX}conv1.weight"] = torch.zeros(24, 3, 14, 14)

    reload_state(folder, format, change, block=None)


@pytest.mark.parametrize("existing", [False, True], ids=["fresh", "overwriting"])
@pytest.mark.parametrize("name", CASES)
def test_damaged_checkpoint(tmp_path, monkeypatch, name, existing):
    monkeypatch.chdir(tmp_path)
    damage, format, error, message = CASES[name]
    source, target = write_checkpoint(tmp_path / "full", format), tmp_path / "encoder"
    if existing:
        extract_vision_encoder(source, target, dtype="bfloat16")
    damage(source, format)
    before = snapshot(tmp_path)
    with pytest.raises(error, match=message) as caught:
        extract_vision_encoder(source, target, overwrite=existing)
    assert str(source) in str(caught.value)
    assert snapshot(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"full", "encoder"}
    assert target.exists() == existing


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": "int8"}, ValueError, "dtype must be one of float64.*got int8"),
        ({"dtype": torch.int32}, ValueError, "dtype must be one of"),
        ({"format": "gguf"}, ValueError, "format must be one of safetensors, bin, got 'gguf'"),
        ({"revision": "main"}, ValueError, "is a directory, so there is no revision main"),
        ({"source": "./nowhere"}, FileNotFoundError, "./nowhere is not a directory, and cannot be"),
        ({"source": "a/b/c"}, FileNotFoundError, "a/b/c is not a directory, and cannot be"),
        ({"source": "full/config.json"}, ValueError, "is a file: pass the directory"),
    ],
    ids=str,
)
def test_unsuitable_arguments(tmp_path, monkeypatch, arguments, error, message):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "full")
    with pytest.raises(error, match=message):
        extract_vision_encoder(**{"source": "full", "destination": "encoder", **arguments})
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


# The extracted directory, when it is loaded


@pytest.fixture
def encoder(tmp_path):
    QwenVisionTransformer(CONFIG).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_loading_lists_every_difference_with_both_shapes(encoder):
    state = visual_tensors()
    del state["ln_pre.bias"]
    state["ln_post.bias"] = torch.zeros(7)
    state["ln_3.bias"] = torch.zeros(5)
    save_file(state, encoder / "model.safetensors")
    with pytest.raises(ValueError, match="are not those of the encoder") as caught:
        QwenVisionTransformer.from_pretrained(encoder)
    for part in (
        "missing ln_pre.bias [32];",
        "unexpected ln_3.bias [5];",
        "of another shape ln_post.bias [7], not [48]",
        str(encoder / "model.safetensors"),
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("config.json", FileNotFoundError, "no config.json in .*visproj extract"),
        ("model.safetensors", FileNotFoundError, "no model.safetensors and no pytorch_model.bin"),
    ],
)
def test_loading_without_a_file(encoder, name, error, message):
    (encoder / name).unlink()
    with pytest.raises(error, match=message):
        QwenVisionTransformer.from_pretrained(encoder)


def test_loading_a_full_checkpoint_says_what_to_do(tmp_path):
    source = write_checkpoint(tmp_path / "full", shards=1)
    with pytest.raises(ValueError, match=r"model_type is 'qwen'.*`visproj extract`"):
        QwenVisionTransformer.from_pretrained(source)


def test_loaded_weights_do_not_depend_on_the_file(encoder):
    loaded = QwenVisionTransformer.from_pretrained(encoder)
    before = loaded.ln_post.weight.clone()
    QwenVisionTransformer(CONFIG).save_pretrained(encoder, overwrite=True)
    (encoder / "model.safetensors").write_bytes(b"\0" * 1000)
    assert torch.equal(loaded.ln_post.weight, before)
    assert loaded.ln_post.weight.untyped_storage().nbytes() == before.nbytes
