"""Prepared samples to batches: images are decoded here, one at a time, in loader workers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from visproj.errors import InputError
from visproj.vlm.compose import IGNORE_INDEX
from visproj.vlm.encoders import VisionEncoder
from visproj.vlm.features import FeatureShards
from visproj.vlm.model import VisualLanguageModel
from visproj.vlm.photographs import read_rgb
from visproj.vlm.preparing import DialogueEncoder, Prepared, stored_image, undecoded
from visproj.vlm.prompts import Dialogue
from visproj.vlm.samples import USUAL, Columns, Sample, read_sample
from visproj.vlm.sources import FAULT

TRIES = 16  # samples in place of one that cannot be decoded
SHUFFLED = 1000  # rows of a stream among which the next one is drawn


@dataclass(frozen=True)
class Views:
    """Which part of each image is shown.

    Attributes:
        count: Views per sample; each is a sample of its own.
        cut: ``(image, number of the view, number of the sample) -> image``; ``None`` shows all of
            the image that the encoder sees.
    """

    count: int = 1
    cut: Callable[[Image.Image, int, int], Image.Image] | None = None


class Picture(NamedTuple):
    """An image of a sample, on the way to the encoder.

    Attributes:
        content: Features ``[S, C]`` that were computed before, or pixels ``[3, H, W]``.
        digest: Of the image's bytes and the view, by which features are kept; ``""`` keeps none.
    """

    content: Tensor
    digest: str


class Example(NamedTuple):
    """A sample that can be collated.

    Attributes:
        dialogue: Its tokens.
        pictures: Its images.
        faults: Samples that were passed over on the way to this one, and why.
    """

    dialogue: Dialogue
    pictures: list[Picture]
    faults: list[str]


@dataclass(frozen=True)
class PictureReader:
    """Decodes images into an encoder's pixels, or finds their features.

    Attributes:
        encoder: Crops and normalises.
        shards: Features on disk; ``None`` keeps none.
    """

    encoder: VisionEncoder
    shards: FeatureShards | None = None

    def __call__(
        self, source: Path | bytes, cut: Callable[[Image.Image], Image.Image], view: str
    ) -> Picture:
        """Read one image.

        Args:
            source: A file or its bytes.
            cut: The view of it.
            view: Name of the view.

        Raises:
            FileNotFoundError: There is no such file.
            InputError: The file is not an image, or is damaged.
        """
        digest = ""
        if self.shards is not None:
            content = source if isinstance(source, bytes) else source.read_bytes()
            digest = hashlib.sha256(content + view.encode()).hexdigest()
            features = self.shards.get(digest)
            if features is not None:
                return Picture(features, digest)
            source = content if isinstance(source, bytes) else source
        (pixels,) = self.encoder.preprocess([cut(read_rgb(source))])
        return Picture(pixels, digest)


class Samples(Dataset[Example]):
    """The samples of a prepared split, one for each of their views.

    An image that cannot be read has the next sample take the place of its own, so that every
    process makes the same number of steps; the fault is passed along with it.

    Args:
        prepared: From :func:`~visproj.vlm.preparing.prepare`.
        encode: Texts to tokens.
        read: Files to pixels.
        views: Of each sample.
    """

    def __init__(
        self,
        prepared: Prepared,
        encode: DialogueEncoder,
        read: PictureReader,
        views: Views = Views(),
    ) -> None:
        self.prepared = prepared
        self.views = views
        self._encode = encode
        self._read = read

    def __len__(self) -> int:
        return len(self.prepared.table) * self.views.count

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sample, visual ones included."""
        lengths = self.prepared.table["length"][:]
        return [length for length in lengths for _ in range(self.views.count)]

    def __getitem__(self, index: int) -> Example:
        faults: list[str] = []
        samples, views = len(self.prepared.table), self.views.count
        for offset in range(min(TRIES, samples)):
            number, view = divmod((index + offset * views) % len(self), views)
            row = self.prepared.table[number]
            try:
                sources = self.prepared.images(number)
                pictures = [self._picture(source, view, row["row"]) for source in sources]
            except (InputError, OSError) as error:
                faults.append(f"{row['where']}: {error}")
                continue
            dialogue, _ = self._encode(Sample(row["questions"], row["answers"]), len(pictures))
            return Example(dialogue, pictures, faults)
        raise InputError(f"no image of {len(faults)} samples in a row can be read: {faults[0]}")

    def _picture(self, source: Path | bytes, view: int, row: int) -> Picture:
        cut = self.views.cut
        if cut is None:
            return self._read(source, _whole, "")
        # The name of a function is the same in every process, unlike its text, which has addresses.
        name = f"{cut.__module__}.{cut.__qualname__} {view} {row}"
        return self._read(source, lambda image: cut(image, view, row), name)


def _whole(image: Image.Image) -> Image.Image:
    return image


class StreamedSamples(IterableDataset[Example]):
    """Samples of a stream, without end: after its last row it begins again, in another order.

    Args:
        rows: A ``datasets.IterableDataset``, this process's part of it.
        columns: From :meth:`Columns.found_in`, or what the user chose if the columns are unknown.
        prompt: The question that captions answer.
        encode: Texts to tokens.
        read: Bytes to pixels.
        seed: Of the order.
        alternatives: Whether a sample may have several answers; else it has its first one.
    """

    def __init__(
        self,
        rows: Any,
        columns: Columns,
        prompt: str,
        encode: DialogueEncoder,
        read: PictureReader,
        seed: int,
        *,
        alternatives: bool = True,
    ) -> None:
        self._rows = undecoded(rows) if rows.features else rows
        self._seed = seed
        self._columns = columns
        self._prompt = prompt
        self._encode = encode
        self._read = read
        self._alternatives = alternatives

    def __iter__(self) -> Iterator[Example]:
        epoch = 0
        faults: list[str] = []
        while True:
            found = False
            # Not set_epoch, whose number loader workers share: one would change another's order.
            rows = self._rows.shuffle(seed=self._seed + epoch, buffer_size=SHUFFLED)
            for number, row in enumerate(rows):
                try:
                    example = self._example(row)
                except (InputError, OSError) as error:
                    faults.append(f"{row.get('__key__', f'row {number}')}: {error}")
                    continue
                found = True
                yield example._replace(faults=faults)
                faults = []
            if not found and not faults and get_worker_info() is not None:
                return  # there are more workers than shards: others have the rows
            if not found:
                reasons = f": {faults[0]}" if faults else ""
                raise InputError(f"the stream has no sample that can be used{reasons}")
            epoch += 1

    def _example(self, row: Mapping[str, Any]) -> Example:
        if FAULT in row:
            raise InputError(row[FAULT])
        values = _fields(row)
        names = [*values, *filter(None, [self._columns.image])]
        columns = self._columns.found_in(names, "it")
        sample = read_sample(values, columns, self._prompt)
        if not sample.is_complete:
            sample = Sample(sample.questions[:-1], sample.answers)
        if not sample.questions:
            raise InputError(f"it has no answer: it has {', '.join(values)}")
        if not self._alternatives:
            sample = Sample(sample.questions, [answers[:1] for answers in sample.answers])
        images = _streamed_images(values.get(columns.image) if columns.image else None)
        dialogue, _ = self._encode(sample, len(images))
        return Example(dialogue, [self._read(image, _whole, "") for image in images], [])


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row and those of its ``json``, which may name the image that is beside it."""
    values = {name: value for name, value in row.items() if value is not None}
    inner = values.get("json")
    if not isinstance(inner, Mapping):
        return values
    has_image = any(name.lower() in USUAL["image"] for name in values)
    given = {
        name: value
        for name, value in inner.items()
        if value is not None and not (has_image and name in USUAL["image"])
    }
    return {**given, **values}


def _streamed_images(value: Any) -> list[Path | bytes]:
    entries = [] if value is None else value if isinstance(value, list) else [value]
    return [stored_image(entry, Path()) for entry in entries]


def collate(examples: Sequence[Example]) -> dict[str, Any]:
    """Put examples into one batch, padded on the right.

    Returns:
        What :meth:`~visproj.vlm.model.VisualLanguageModel.forward` takes, but features. In their
        place: ``contents``, a list of pixels ``[3, H, W]`` or features ``[S, C]``; and ``digests``
        and ``faults``, lists of texts.
    """
    dialogues = [example.dialogue for example in examples]
    pictures = [picture for example in examples for picture in example.pictures]
    return {
        "input_ids": _padded((dialogue.ids for dialogue in dialogues), 0),  # which nothing reads
        "attention_mask": _padded((dialogue.branches for dialogue in dialogues), 0),
        "labels": _padded((dialogue.labels for dialogue in dialogues), IGNORE_INDEX),
        "images_per_sample": [len(example.pictures) for example in examples],
        "contents": [picture.content for picture in pictures],
        "digests": [picture.digest for picture in pictures],
        "faults": [fault for example in examples for fault in example.faults],
    }


def _padded(rows: Iterable[Sequence[int]], value: int) -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def encoded(
    contents: Sequence[Tensor],
    digests: Sequence[str],
    model: VisualLanguageModel,
    shards: FeatureShards | None,
) -> Tensor:
    """Features ``[N, S, C]`` of a batch's images; those that were pixels are kept on disk.

    Args:
        contents: Pixels ``[3, H, W]`` or features ``[S, C]`` of each image.
        digests: As :class:`Picture` has them.
        model: Whose encoder turns pixels into features.
        shards: Where new features are kept; ``None`` keeps none.
    """
    if not contents:
        return model.no_features()
    new = [index for index, content in enumerate(contents) if content.ndim == 3]
    features: list[Tensor] = list(contents)
    if new:
        found = model.encoder.encode(torch.stack([contents[index] for index in new]))
        for index, one in zip(new, found, strict=True):
            features[index] = one
            if shards is not None:  # rounded as they will be when they come from the disk
                shards.put(digests[index], one)
                features[index] = one.to(torch.bfloat16)
    device = features[new[0]].device if new else features[0].device
    return torch.stack([one.to(device, torch.float32) for one in features])
