import errno
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vlm.tiny import TinyEncoder, tiny_photograph

from visproj.vlm.features import FeatureShards, encode_images, prune

LIMIT = 10**6
SIZE = 17 * 32 * 2  # bytes of an image's features


def kept(folder, encoder=None, limit=LIMIT):
    return FeatureShards(encoder or TinyEncoder(), folder, limit)


def features(seed=0):
    return torch.randn(17, 32, generator=torch.Generator().manual_seed(seed))


def filled(folder, *digests, **options):
    """Shards with the features of several digests on disk."""
    shards = kept(folder, **options)
    for seed, digest in enumerate(digests):
        shards.put(digest, features(seed))
    shards.flush()
    return shards


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


def test_images_are_encoded_a_few_at_a_time():
    encoder = TinyEncoder()
    photographs = [tiny_photograph(seed) for seed in range(19)]
    taken = []
    found = encode_images(encoder, (taken.append(0) or photo for photo in photographs))
    assert encoder.batches == [8, 8, 3]
    torch.testing.assert_close(found, encoder.encode(encoder.preprocess(photographs)))
    assert encode_images(encoder, []).shape == (0, 17, 32)


def test_the_next_run_reads_the_disk(tmp_path):
    first = filled(tmp_path / "a" / "b", "x", "y")
    for shards in (first, kept(tmp_path / "a" / "b")):
        assert torch.equal(shards.get("x"), features(0).bfloat16())
        assert torch.equal(shards.get("y"), features(1).bfloat16())
        assert shards.get("z") is None
    assert len(files(tmp_path)) == 1


def test_a_file_holds_many_images(tmp_path):
    shards = kept(tmp_path)
    for number in range(130):
        shards.put(str(number), features(number))
        assert torch.equal(shards.get(str(number)), features(number).bfloat16())
    assert [len(load_file(file)) for file in files(tmp_path)] == [64, 64]
    shards.flush()
    shards.flush()
    assert sorted(len(load_file(file)) for file in files(tmp_path)) == [2, 64, 64]


def test_an_image_is_kept_once(tmp_path):
    shards = filled(tmp_path, "x", "x")
    shards.put("x", features(5))
    shards.flush()
    assert torch.equal(shards.get("x"), features(0).bfloat16())
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("encoder", [TinyEncoder("other"), TinyEncoder(side=32)])
def test_other_encoders_have_other_features(tmp_path, encoder):
    filled(tmp_path, "x")
    other = filled(tmp_path, encoder=encoder)
    assert other.get("x") is None
    other.put("x", features(7))
    other.flush()
    assert torch.equal(kept(tmp_path).get("x"), features(0).bfloat16())
    assert torch.equal(kept(tmp_path, encoder).get("x"), features(7).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_parts_of_a_batch_in_any_dtype(tmp_path, dtype):
    batch = torch.stack([features(0), features(1)]).transpose(0, 1).contiguous().to(dtype)
    shards = kept(tmp_path)
    for number, one in enumerate(batch.transpose(0, 1).requires_grad_()):
        shards.put(str(number), one)
    shards.flush()
    for number in (0, 1):
        found = kept(tmp_path).get(str(number))
        assert torch.equal(found, features(number).to(dtype).bfloat16())
        assert not found.requires_grad


@pytest.mark.gpu
def test_features_of_a_gpu(tmp_path):
    shards = kept(tmp_path)
    shards.put("x", features().cuda())
    assert shards.get("x").device.type == "cpu"
    shards.flush()
    assert torch.equal(kept(tmp_path).get("x"), features().bfloat16())


def truncated(file):
    file.write_bytes(file.read_bytes()[:-100])


def empty(file):
    file.write_bytes(b"")


def other_tensors(file):
    save_file({"something": torch.zeros(1)}, file)


def removed(file):
    file.unlink()


DAMAGES = [truncated, empty, other_tensors, removed]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("before", [True, False], ids=["before the run", "in the run"])
def test_what_is_damaged_is_kept_again(tmp_path, damage, before):
    shards = filled(tmp_path, "x", "y")
    damage(files(tmp_path)[0])
    shards = kept(tmp_path) if before else shards
    assert shards.get("x") is None
    shards.put("x", features(0))
    shards.put("y", features(1))  # a loader worker has found it damaged, this process has not
    shards.flush()
    for found in (shards, kept(tmp_path)):
        assert torch.equal(found.get("x"), features(0).bfloat16())
        assert torch.equal(found.get("y"), features(1).bfloat16())


def test_files_of_other_processes_are_found_by_the_next_run(tmp_path):
    mine = filled(tmp_path, "x")
    filled(tmp_path, "z", "y")
    assert mine.get("y") is None
    mine.put("y", features(1))
    mine.flush()
    assert torch.equal(mine.get("x"), features(0).bfloat16())
    assert torch.equal(kept(tmp_path).get("y"), features(1).bfloat16())


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", ["os.replace", "visproj.vlm.features.write_safetensors"])
def test_a_full_disk_does_not_stop_a_run(tmp_path, monkeypatch, caplog, name):
    shards = filled(tmp_path, "x")
    before = list(tmp_path.rglob("*"))
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "visproj"):
        patch.setattr(name, full)
        for number in range(200):
            shards.put(str(number), features(number))
        shards.flush()
    assert len(caplog.records) == 1
    assert "features are not kept on disk: cannot write" in caplog.text or "No space" in caplog.text
    assert list(tmp_path.rglob("*")) == before
    assert shards.get("5") is None
    assert torch.equal(shards.get("x"), features(0).bfloat16())


def test_a_folder_that_is_a_file(tmp_path, caplog):
    (tmp_path / "taken").write_text("mine")
    shards = filled(tmp_path / "taken", "x")
    assert shards.get("x") is None
    assert (tmp_path / "taken").read_text() == "mine"
    assert len(caplog.records) == 1


def test_features_in_a_folder_of_someone_else_are_read(tmp_path, monkeypatch):
    filled(tmp_path, "x")
    monkeypatch.setattr(os, "utime", full)
    assert torch.equal(kept(tmp_path).get("x"), features(0).bfloat16())


# The bound


def test_what_does_not_fit_is_not_kept(tmp_path):
    shards = filled(tmp_path, *map(str, range(100)), limit=10 * SIZE)
    found = [number for number in range(100) if shards.get(str(number)) is not None]
    assert found == list(range(10))
    assert sum(len(load_file(file)) for file in files(tmp_path)) == 10
    assert (
        filled(tmp_path, "new", limit=10 * SIZE).get("new") is not None
    )  # headers were not counted


def test_the_next_run_has_what_room_is_left(tmp_path):
    filled(tmp_path, "a", "b")
    shards = filled(tmp_path, "c", "d", limit=files(tmp_path)[0].stat().st_size + SIZE)
    found = [digest for digest in "abcd" if shards.get(digest) is not None]
    assert found == ["a", "b", "c"]


def test_reading_counts_as_use(tmp_path):
    filled(tmp_path, "x")
    (file,) = files(tmp_path)
    os.utime(file, (1, 1))
    assert kept(tmp_path).get("x") is not None
    assert file.stat().st_mtime > 1e9


def used_at(folder, **times):
    """Files of 100 bytes each, last used at these seconds."""
    folder.mkdir(exist_ok=True)
    for name, second in times.items():
        file = folder / f"{name}.safetensors"
        file.write_bytes(bytes(100))
        os.utime(file, (second, second))


def names(folder):
    return [file.stem for file in files(folder)]


def test_the_files_unused_for_longest_are_removed(tmp_path):
    used_at(tmp_path, a=4, b=1, c=3)
    used_at(tmp_path / "other encoder", d=2)
    (tmp_path / "notes.txt").write_text("mine")
    for limit, left in ((400, "abcd"), (299, "ac"), (0, "")):
        assert prune(tmp_path, limit) == 100 * len(left)
        assert names(tmp_path) == list(left)
    assert (tmp_path / "notes.txt").exists()
    assert prune(tmp_path / "nowhere", 0) == 0


def test_a_file_that_another_process_removes_or_holds(tmp_path, monkeypatch):
    used_at(tmp_path, a=1, b=2, c=3)
    unlink = Path.unlink

    def busy(path):
        if path.stem == "b":
            raise PermissionError
        unlink(path)

    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(Path, "unlink", busy)
    prune(tmp_path, 100)
    assert names(tmp_path) == ["b", "c", "gone"]


def test_old_features_go_before_new_ones_are_written(tmp_path):
    shards = filled(tmp_path, "a")
    os.utime(files(tmp_path)[0], (1, 1))
    used_at(shards.folder, old=2, newer=3)
    size = files(tmp_path)[0].stat().st_size
    filled(tmp_path, "b", limit=200)
    assert names(tmp_path) == ["newer", "old"]
    assert size > 200
