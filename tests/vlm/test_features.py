import errno

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from vlm.tiny import TinyEncoder, tiny_photograph

from visproj.vlm.features import FeatureCache


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
