import io
import json
import tarfile
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import DataLoader
from vlm.tiny import TinyEncoder, tiny_model, tiny_photograph
from vlm.training_models import write_captions, write_dialogues

from visproj.errors import InputError
from visproj.vlm.compose import IGNORE_INDEX
from visproj.vlm.features import FeatureShards
from visproj.vlm.loading import (
    TRIES,
    Example,
    Picture,
    PictureReader,
    Samples,
    StreamedSamples,
    Views,
    collate,
    encoded,
)
from visproj.vlm.preparing import DialogueEncoder, prepare
from visproj.vlm.prompts import Dialogue
from visproj.vlm.samples import Columns
from visproj.vlm.sources import open_source
from visproj.vlm.views import held_out_view, training_view

PROMPT = "What is it?"
WHOLE = Views()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VISPROJ_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def encode(model):
    return DialogueEncoder(model, None)


@pytest.fixture
def shards(tmp_path):
    return FeatureShards(TinyEncoder(), tmp_path / "features", 10**6)


def samples(data, encode, views=WHOLE, shards=None):
    prepared = prepare(open_source(str(data)), "train", Columns(), PROMPT, encode)
    return Samples(prepared, encode, PictureReader(encode.model.encoder, shards), views)


def pixels(image):
    (found,) = TinyEncoder().preprocess([image])
    return found


# Samples of a table


def test_examples_are_dialogues_and_pixels(tmp_path, encode, model):
    data = samples(write_dialogues(tmp_path / "llava"), encode)
    assert len(data) == 8
    assert [len(example.pictures) for example in (data[n] for n in range(8))] == [0, 1, 2] * 2 + [
        0,
        1,
    ]
    example = data[5]
    for number, picture in enumerate(example.pictures):
        assert torch.equal(picture.content, pixels(tiny_photograph(50 + number)))
        assert picture.digest == ""
    row = data.prepared.table[5]
    assert example.dialogue == model.dialogue(row["questions"], row["answers"], 2)
    assert example.faults == []


def test_lengths_go_with_the_samples(tmp_path, encode):
    data = samples(write_captions(tmp_path / "a"), encode, Views(2, training_view))
    lengths = data.prepared.table["length"][:]
    assert data.lengths == [length for length in lengths for _ in range(2)]
    assert len(data) == len(data.lengths) == 12


def test_views_are_samples(tmp_path, encode):
    views = Views(5, lambda image, view, number: held_out_view(image, view))
    data = samples(write_captions(tmp_path / "a", 3), encode, views)
    for number in range(3):
        for view in range(5):
            want = pixels(held_out_view(tiny_photograph(number), view))
            assert torch.equal(data[number * 5 + view].pictures[0].content, want)


def test_training_views_have_their_samples_seed(tmp_path, encode):
    data = samples(write_captions(tmp_path / "a", 3), encode, Views(4, training_view))
    want = pixels(training_view(tiny_photograph(2), 3, 2))
    assert torch.equal(data[2 * 4 + 3].pictures[0].content, want)


def damage(folder, *numbers):
    for number in numbers:
        (folder / f"{number}.png").write_bytes(b"damaged")


def test_the_next_sample_takes_the_place_of_a_damaged_one(tmp_path, encode):
    folder = write_captions(tmp_path / "a", 6)
    data = samples(folder, encode, Views(2, training_view))
    damage(folder, 1, 2)
    (folder / "5.png").unlink()
    assert data[0].faults == []
    example = data[2 * 1 + 1]
    assert torch.equal(example.pictures[0].content, data[2 * 3 + 1].pictures[0].content)
    first, second = example.faults
    assert first.startswith(f"{folder}/captions.jsonl, line 2: cannot read {folder}/1.png as an")
    assert ", line 3: cannot read" in second
    last = data[2 * 5]  # begins again with the first
    assert torch.equal(last.pictures[0].content, data[0].pictures[0].content)
    assert last.faults == [f"{folder}/captions.jsonl, line 6: no such image: {folder}/5.png"]


@pytest.mark.parametrize("count", [3, TRIES + 1])
def test_samples_that_are_all_damaged(tmp_path, encode, count):
    folder = write_captions(tmp_path / "a", count)
    data = samples(folder, encode, Views(2, training_view))
    damage(folder, *range(count))
    message = f"^cannot read the images of {min(count, TRIES)} samples in a row: .*line 1: cannot"
    with pytest.raises(InputError, match=message):
        data[0]


def test_embedded_images(tmp_path, encode):
    images = [tiny_photograph(number) for number in range(4)]
    rows = {"image": images, "caption": list("abcd")}
    features = {"image": datasets.Image(), "caption": datasets.Value("string")}
    table = datasets.Dataset.from_dict(rows, datasets.Features(features))
    table.to_parquet(tmp_path / "a.parquet")
    data = samples(tmp_path / "a.parquet", encode)
    some = Samples(data.prepared.select([3, 1]), encode, PictureReader(TinyEncoder()))
    for number, example in zip((3, 1), (some[0], some[1]), strict=True):
        assert torch.equal(example.pictures[0].content, pixels(images[number]))


def test_workers_give_the_same(tmp_path, encode):
    data = samples(write_dialogues(tmp_path / "llava"), encode)
    alone, together = (
        list(DataLoader(data, batch_size=2, collate_fn=collate, num_workers=workers))
        for workers in (0, 2)
    )
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert len(one["contents"]) == len(other["contents"])
        assert all(map(torch.equal, one["contents"], other["contents"]))


# Features in the place of pixels


def test_features_are_found_by_bytes_and_view(tmp_path, encode, model, shards):
    folder = write_captions(tmp_path / "a", 2)
    (folder / "1.png").write_bytes((folder / "0.png").read_bytes())
    whole = samples(folder, encode, shards=shards)
    views = samples(folder, encode, Views(2, training_view), shards)
    held_out = Views(1, lambda image, view, number: held_out_view(image, view))
    other = samples(folder, encode, held_out, shards)
    digests = [
        data[n].pictures[0].digest for data in (whole, views, other) for n in range(len(data))
    ]
    assert digests[0] == digests[1]  # the same file
    assert len(set(digests)) == 7
    pictures = whole[0].pictures
    found = encoded([pictures[0].content], [pictures[0].digest], model, shards)
    content = whole[1].pictures[0].content
    assert content.shape == (17, 32)
    assert torch.equal(content, found[0].bfloat16())
    assert views[0].pictures[0].content.shape == (3, 16, 16)


def test_views_keep_their_names_from_run_to_run(tmp_path, encode, shards):
    folder = write_captions(tmp_path / "a", 1)

    def digest():
        views = Views(1, lambda image, view, number: image)
        return samples(folder, encode, views, shards)[0].pictures[0].digest

    assert digest() == digest()


def test_encoded_takes_pixels_and_features_together(model, shards):
    contents = [pixels(tiny_photograph(number)) for number in range(3)]
    model.encoder.batches.clear()
    fresh = encoded(contents, ["a", "b", "c"], model, shards)
    mixed = encoded([contents[0], shards.get("b"), contents[2]], ["d", "b", "e"], model, shards)
    assert model.encoder.batches == [3, 2]
    assert fresh.dtype == mixed.dtype == torch.float32
    # What is kept has the same numbers whether it was computed now or comes from the disk.
    assert torch.equal(fresh, mixed)
    exact = encoded(contents, [""] * 3, model, None)
    assert torch.equal(exact.bfloat16().float(), fresh)
    assert torch.equal(exact, model.encoder.encode(torch.stack(contents)))
    assert encoded([], [], model, shards).shape == (0, 17, 32)


# Batches


def test_batches_are_padded_on_the_right():
    one = Dialogue([5, 6, 7], [-100, 6, 7], [1, 2, 3])
    other = Dialogue([8], [8], [1])
    pictures = [Picture(torch.ones(3, 2, 2), "x"), Picture(torch.zeros(4, 5), "")]
    batch = collate([Example(one, [], ["bad"]), Example(other, pictures, [])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 2, 3], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, IGNORE_INDEX, IGNORE_INDEX]]
    assert batch["images_per_sample"] == [0, 2]
    assert [content.shape for content in batch["contents"]] == [(3, 2, 2), (4, 5)]
    assert (batch["digests"], batch["faults"]) == (["x", ""], ["bad"])


def test_the_model_takes_batches(tmp_path, encode, model, shards):
    data = samples(write_dialogues(tmp_path / "llava"), encode, shards=shards)
    batch = collate([data[number] for number in range(6)])
    contents, digests = batch.pop("contents"), batch.pop("digests")
    assert batch.pop("faults") == []
    found = model(features=encoded(contents, digests, model, shards), **batch)
    assert found["loss"].isfinite()
    assert found["tokens"].tolist() == [(batch["labels"][row] >= 0).sum() for row in range(6)]


# Streams


def png(grey):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (grey,) * 3).save(file, "png")
    return file.getvalue()


def grey(example):
    """The number of a sample, from its image."""
    (picture,) = example.pictures
    mean, std = (np.array(value) for value in (TinyEncoder().config.mean, TinyEncoder().config.std))
    return round(float(picture.content[0, 0, 0]) * std[0] * 255 + mean[0] * 255)


def write_shard(path, samples):
    """A tar of samples: contents by their suffixes."""
    with tarfile.open(path, "w") as archive:
        for number, sample in enumerate(samples):
            for suffix, content in sample.items():
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                entry = tarfile.TarInfo(f"{number:04}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def write_shards(folder, shards=2, each=6):
    folder.mkdir()
    for shard in range(shards):
        numbers = range(shard * each, (shard + 1) * each)
        rows = [{"png": png(number), "txt": b"a cat"} for number in numbers]
        write_shard(folder / f"{shard}.tar", rows)
    return folder


def streamed(data, encode, rank=0, ranks=1, **options):
    rows = open_source(str(data)).split("train")
    rows = split_dataset_by_node(rows, rank, ranks)
    read = PictureReader(encode.model.encoder)
    columns = options.pop("columns", Columns())
    return StreamedSamples(rows, columns, PROMPT, encode, read, seed=0, **options)


def test_a_stream_goes_on_in_another_order(tmp_path, encode):
    stream = streamed(write_shards(tmp_path / "a"), encode)
    found = [grey(example) for example in islice(stream, 36)]
    epochs = found[:12], found[12:24], found[24:]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [grey(example) for example in islice(stream, 12)] == epochs[0]


@pytest.mark.parametrize(("shards", "each"), [(2, 6), (1, 12), (3, 4)])
def test_processes_share_a_stream(tmp_path, encode, shards, each):
    folder = write_shards(tmp_path / "a", shards, each)
    for start in (0, 6):  # also of the second epoch
        parts = [
            [grey(one) for one in islice(streamed(folder, encode, rank, 2), start, start + 6)]
            for rank in (0, 1)
        ]
        assert sorted(parts[0] + parts[1]) == list(range(12))


@pytest.mark.parametrize(("shards", "each"), [(2, 6), (1, 12), (3, 4)])
def test_workers_share_a_stream(tmp_path, encode, shards, each):
    stream = streamed(write_shards(tmp_path / "a", shards, each), encode)
    loader = DataLoader(stream, batch_size=None, num_workers=2, prefetch_factor=1)
    found = [grey(example) for example in islice(loader, 12)]
    if shards == 3:  # one worker has twice as many, and the other has begun again
        assert set(found) <= set(range(12))
        assert len(set(found)) >= 10
        return
    assert sorted(found) == list(range(12))


def test_processes_with_workers_share_a_stream(tmp_path, encode):
    folder = write_shards(tmp_path / "a", 4, 3)
    found = []
    for rank in (0, 1):
        stream = streamed(folder, encode, rank, 2)
        loader = DataLoader(stream, batch_size=None, num_workers=2, prefetch_factor=1)
        found += [grey(example) for example in islice(loader, 6)]
    assert sorted(found) == list(range(12))


CONVERSATION = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": " a cat"}]
ROWS = {
    "a caption in json": {"jpg": png(1), "json": {"caption": "a cat", "id": 3}},
    "a conversation in json": {"png": png(1), "json": {"conversations": CONVERSATION}},
    "an image named in json": {
        "JPG": png(1),
        "json": {"image": "elsewhere/1.jpg", "conversations": CONVERSATION},
    },
    "capital letters": {"PNG": png(1), "TXT": b" a cat\n"},
    "a caption that is null": {"jpeg": png(1), "json": {"captions": None, "text": "a cat"}},
    "several captions": {"webp": png(1), "json": {"captions": ["a cat", "a dog"]}},
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_samples_of_shards(tmp_path, encode, model, row):
    write_shard(tmp_path / "a.tar", [row])
    (example,) = islice(streamed(tmp_path / "a.tar", encode, alternatives=False), 1)
    assert grey(example) == 1
    question = "<image>\nWhat?" if "conversations" in row.get("json", {}) else PROMPT
    assert example.dialogue == model.dialogue([question], [["a cat"]], 1)


def test_several_answers_in_a_stream(tmp_path, encode):
    write_shard(tmp_path / "a.tar", [{"png": png(1), "json": {"captions": ["a cat", "dog"]}}])
    (example,) = islice(streamed(tmp_path / "a.tar", encode), 1)
    assert set(example.dialogue.branches) == {1, 2, 3}


def test_shards_of_mixed_kinds(tmp_path, encode):
    rows = [
        {"jpg": png(0), "txt": b"a"},
        {"png": png(1), "txt": b"a"},
        {"png": png(2), "json": {"id": "x", "caption": "a"}},
        {"png": png(3), "json": {"id": 3, "conversations": CONVERSATION}},
    ]
    write_shard(tmp_path / "a.tar", rows)
    found = list(islice(streamed(tmp_path / "a.tar", encode), 4))
    assert sorted(map(grey, found)) == [0, 1, 2, 3]


BAD = {
    "a damaged image": ({"png": b"damaged", "txt": b"a"}, "cannot read an image of 7 bytes"),
    "no caption": ({"png": png(9)}, "it has no column with texts: it has __key__, png"),
    "no image": ({"txt": b"a"}, "it has a caption and no image"),
    "a blank caption": ({"png": png(9), "txt": b" "}, "its txt is|its caption is ' '"),
    "damaged json": ({"png": png(9), "json": b"{"}, "its json cannot be read"),
    "no answer": ({"png": png(9), "json": {"question": "a"}}, "it has no answer"),
    "no image of a conversation": (
        {"json": {"conversations": CONVERSATION}},
        "1 <image> placeholders in the text of 0 images",
    ),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_damaged_samples_of_a_stream_are_skipped(tmp_path, encode, row, message):
    good = {"png": png(1), "txt": b"a"}
    write_shard(tmp_path / "a.tar", [good, row, good])
    found = list(islice(streamed(tmp_path / "a.tar", encode), 6))
    assert list(map(grey, found)) == [1] * 6
    faults = [fault for example in found for fault in example.faults]
    assert len(faults) in (2, 3)  # one of each epoch
    with pytest.raises(AssertionError, match=rf"a\.tar, 0001: .*({message})"):
        raise AssertionError(faults[0])


def test_a_stream_of_nothing_usable(tmp_path, encode):
    write_shard(tmp_path / "a.tar", [{"png": b"x", "txt": b"a"}] * 2)
    with pytest.raises(
        InputError, match=r"no sample that can be used: .*a\.tar, 000\d: cannot read"
    ):
        next(iter(streamed(tmp_path / "a.tar", encode)))
    write_shard(tmp_path / "a.tar", [])
    with pytest.raises(InputError, match=r"no sample that can be used$"):
        next(iter(streamed(tmp_path / "a.tar", encode)))


def test_chosen_columns_of_a_stream(tmp_path, encode):
    row = {"photo.png": png(1), "txt": b"a dog", "json": {"says": "a cat"}}
    write_shard(tmp_path / "a.tar", [row])
    columns = Columns(image="photo.png", caption="says")
    (example,) = islice(streamed(tmp_path / "a.tar", encode, columns=columns), 1)
    assert grey(example) == 1
    stream = streamed(tmp_path / "a.tar", encode, columns=Columns(caption="nowhere"))
    with pytest.raises(InputError, match="it has no column nowhere: it has says, __key__"):
        next(iter(stream))


def test_streams_of_a_table_have_images_decoded_here(encode):
    images = [{"bytes": png(1), "path": None}, {"bytes": b"damaged", "path": None}]
    rows = {"image": images, "caption": ["a", "b"]}
    features = {"image": datasets.Image(), "caption": datasets.Value("string")}
    table = datasets.Dataset.from_dict(rows, datasets.Features(features)).to_iterable_dataset()
    read = PictureReader(TinyEncoder())
    stream = StreamedSamples(table, Columns(), PROMPT, encode, read, seed=0)
    found = list(islice(stream, 3))
    assert list(map(grey, found)) == [1, 1, 1]
    assert any("row " in fault and "7 bytes" in fault for one in found for fault in one.faults)


def test_a_long_text_of_a_stream_is_cut(tmp_path, model):
    write_shard(tmp_path / "a.tar", [{"png": png(1), "txt": b"c" * 99}])
    encode = DialogueEncoder(model, 60)
    (example,) = islice(streamed(tmp_path / "a.tar", encode), 1)
    assert encode.length(example.dialogue, 1) == 60
