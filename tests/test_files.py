"""Weight files that are not what their names say, and the other parts of ``visproj.files``."""

import json

import pytest
import torch
from safetensors.torch import save_file

from visproj.errors import InputError
from visproj.files import check_weight_files

STAND_INS = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "Git LFS pointer"),
    "page": (b"\n<!DOCTYPE html><html></html>", "web page"),
    "page with a mark": (b"\xef\xbb\xbf<HTML>", "web page"),
    "empty": (b"", "is empty"),
    "text": (b'{"error": "Access denied"}', "is text"),
}
NAMES = (
    "model.safetensors",
    "pytorch_model.bin",
    "model-Q8_0.gguf",
    "weights.pt",
    "shard.SafeTensors",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", STAND_INS)
def test_stand_ins_are_named(case, name, tmp_path):
    content, message = STAND_INS[case]
    path = tmp_path / name
    path.write_bytes(content)
    for given in (tmp_path, path):
        with pytest.raises(InputError, match=message) as refused:
            check_weight_files(given)
        assert str(path) in str(refused.value)


def good(path):
    state = {"weight": torch.ones(40, 40)}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_truncated_files_are_named(name, tmp_path):
    path = good(tmp_path / name)
    check_weight_files(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"truncated|not an intact safetensors file"):
        check_weight_files(tmp_path)


def test_a_gguf_that_is_not_one(tmp_path):
    path = good(tmp_path / "model.bin").rename(tmp_path / "model.gguf")
    with pytest.raises(InputError, match=r"model\.gguf is not a GGUF file: it begins with b'PK"):
        check_weight_files(path)


def test_what_no_loader_would_open_may_be_a_pointer(tmp_path):
    good(tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(STAND_INS["pointer"][0])
    (tmp_path / "model.fp16.safetensors").write_bytes(STAND_INS["pointer"][0])
    check_weight_files(tmp_path)


@pytest.mark.parametrize("single", ["model.safetensors", "pytorch_model.bin"])
def test_shards_of_an_index(single, tmp_path):
    first, second = (f"{n}-{single}" for n in range(2))
    index = {"weight_map": {"a": first, "b": second}}
    (tmp_path / f"{single}.index.json").write_text(json.dumps(index))
    good(tmp_path / first)
    with pytest.raises(FileNotFoundError, match=f"no file .*{second}"):
        check_weight_files(tmp_path)
    (tmp_path / second).write_bytes(STAND_INS["pointer"][0])
    with pytest.raises(InputError, match=f"{second} is a Git LFS pointer"):
        check_weight_files(tmp_path)


def test_a_link_that_leads_nowhere(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "1234")
    with pytest.raises(FileNotFoundError, match=r"is a link to .*1234, which is not there"):
        check_weight_files(tmp_path)


def test_folders_without_weights_pass(tmp_path):
    check_weight_files(tmp_path / "someone" / "a-model")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "folder.bin").mkdir()
    (tmp_path / "._model.safetensors").write_bytes(b"a file manager's")
    check_weight_files(tmp_path)
