import errno
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from vlm.tiny import TinyEncoder, tiny_photograph

from visproj.vlm import features
from visproj.vlm.features import FeatureCache, prune


@pytest.fixture
def photographs():
    return [tiny_photograph(seed) for seed in range(3)]


def test_second_call_reads_the_disk(tmp_path, photographs):
    cache = FeatureCache(TinyEncoder(), tmp_path / "a" / "b")
    first = cache(photographs)
    assert first.shape == (3, 17, 32)
    assert cache.encoder.batches == [3]
    other = FeatureCache(TinyEncoder(), tmp_path / "a" / "b")
    assert torch.equal(other(photographs[::-1]), first.flip(0))
    assert other.encoder.batches == []


def test_features_are_the_encoders(tmp_path, photographs):
    encoder = TinyEncoder()
    want = torch.cat([encoder.encode(encoder.preprocess([photo])) for photo in photographs])
    torch.testing.assert_close(FeatureCache(encoder)(photographs), want)
    torch.testing.assert_close(FeatureCache(encoder, tmp_path)(photographs), want)


def test_only_what_is_missing_is_computed_a_batch_at_a_time(tmp_path):
    photographs = [tiny_photograph(seed) for seed in range(20)]
    cache = FeatureCache(TinyEncoder(), tmp_path)
    cache([photographs[7], photographs[12]])
    got = cache(photographs)
    assert cache.encoder.batches == [2, 8, 8, 2]
    assert torch.equal(cache(photographs), got)
    torch.testing.assert_close(got, FeatureCache(TinyEncoder())(photographs))


def changed_pixel(photo):
    photo = photo.copy()
    photo.putpixel((20, 12), (1, 2, 3))
    return TinyEncoder(), photo


def other_encoder(photo):
    return TinyEncoder("other"), photo


def other_size(photo):
    return TinyEncoder(side=32), photo


@pytest.mark.parametrize(
    "change", [changed_pixel, other_encoder, other_size], ids=lambda change: change.__name__
)
def test_key(tmp_path, photographs, change):
    FeatureCache(TinyEncoder(), tmp_path)(photographs[:1])
    encoder, photo = change(photographs[0])
    FeatureCache(encoder, tmp_path)([photo])
    assert encoder.batches == [1]
    assert len(list(tmp_path.iterdir())) == 2


def test_what_the_crop_leaves_out_does_not_matter(tmp_path):
    photo = Image.new("RGB", (48, 16))
    FeatureCache(TinyEncoder(), tmp_path)([photo])
    photo.paste("white", (0, 0, 4, 16))
    cache = FeatureCache(TinyEncoder(), tmp_path)
    cache([photo])
    assert cache.encoder.batches == []


def truncated(file):
    file.write_bytes(file.read_bytes()[:100])


def empty(file):
    file.write_bytes(b"")


def other_tensor(file):
    save_file({"something": torch.zeros(1)}, file)


@pytest.mark.parametrize(
    "damage", [truncated, empty, other_tensor], ids=lambda damage: damage.__name__
)
def test_damaged_file_is_computed_again(tmp_path, photographs, damage):
    cache = FeatureCache(TinyEncoder(), tmp_path)
    want = cache(photographs[:1])
    (file,) = tmp_path.iterdir()
    damage(file)
    assert torch.equal(cache(photographs[:1]), want)
    assert cache.encoder.batches == [1, 1]
    assert torch.equal(cache(photographs[:1]), want)
    assert cache.encoder.batches == [1, 1]


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", ["os.replace", "visproj.vlm.features.write_safetensors"])
def test_a_full_disk_costs_the_cache_alone(tmp_path, photographs, monkeypatch, name):
    cache = FeatureCache(TinyEncoder(), tmp_path)
    cache(photographs[:1])
    before = list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(name, full)
        uncached = cache(photographs)
    assert list(tmp_path.iterdir()) == before
    assert torch.equal(cache(photographs), uncached)


def test_no_images(tmp_path):
    for folder in (None, tmp_path):
        encoder = TinyEncoder()
        assert FeatureCache(encoder, folder)([]).shape == (0, 17, 32)
        assert encoder.preprocess([]).shape == (0, 3, 16, 16)


def test_folder_that_is_a_file(tmp_path, photographs):
    (tmp_path / "taken").write_text("mine")
    found = FeatureCache(TinyEncoder(), tmp_path / "taken")(photographs)
    assert torch.equal(found, FeatureCache(TinyEncoder())(photographs))
    assert (tmp_path / "taken").read_text() == "mine"


def used_at(folder, **times):
    """Files of 100 bytes each, last used at these seconds."""
    folder.mkdir(exist_ok=True)
    for name, second in times.items():
        (folder / name).write_bytes(bytes(100))
        os.utime(folder / name, (second, second))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_files_unused_for_longest_are_removed(tmp_path):
    used_at(tmp_path, a=4, b=1, c=3, d=2)
    prune(tmp_path, 400)
    assert names(tmp_path) == ["a", "b", "c", "d"]
    prune(tmp_path, 299)
    assert names(tmp_path) == ["a", "c"]
    prune(tmp_path, 0)
    assert names(tmp_path) == []


def test_a_file_that_another_process_removes_or_holds(tmp_path, monkeypatch):
    used_at(tmp_path, a=1, b=2, c=3)
    unlink = Path.unlink

    def busy(path):
        if path.name == "b":
            raise PermissionError
        unlink(path)

    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(Path, "unlink", busy)
    prune(tmp_path, 100)
    assert {"b", "c"} <= set(names(tmp_path))
    assert "a" not in names(tmp_path)


def test_old_features_go_before_new_ones_are_written(tmp_path, photographs, monkeypatch):
    monkeypatch.setattr(features, "LIMIT", 150)
    used_at(tmp_path, old=1, newer=2)
    cache = FeatureCache(TinyEncoder(), tmp_path)
    cache(photographs)
    assert "newer" in names(tmp_path)
    assert "old" not in names(tmp_path)
    assert len(names(tmp_path)) == 4  # what this run wrote stays, however much it is
    cache(photographs)
    assert cache.encoder.batches == [3]


def test_reading_counts_as_use(tmp_path, photographs):
    FeatureCache(TinyEncoder(), tmp_path)(photographs[:1])
    (file,) = tmp_path.iterdir()
    os.utime(file, (1, 1))
    cache = FeatureCache(TinyEncoder(), tmp_path)
    cache(photographs[:1])
    assert cache.encoder.batches == []
    assert file.stat().st_mtime > 1e9


def test_features_in_a_folder_of_someone_else_are_read(tmp_path, photographs, monkeypatch):
    FeatureCache(TinyEncoder(), tmp_path)(photographs[:1])
    monkeypatch.setattr(os, "utime", full)
    cache = FeatureCache(TinyEncoder(), tmp_path)
    cache(photographs[:1])
    assert cache.encoder.batches == []
