"""Batches from prepared samples: loader workers decode the images here, one at a time."""

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

TRIES = 16  # samples in a row whose images may be tried
SHUFFLED = 1000  # rows in the shuffle buffer of a stream


@dataclass(frozen=True)
class Views:
    """The views of each image: their number, and the function that cuts one out.

    Attributes:
        count: Views per sample; each is a sample of its own.
        cut: ``(image, number of the view, number of the row) -> image``; ``None`` gives the encoder
            the whole image.
    """

    count: int = 1
    cut: Callable[[Image.Image, int, int], Image.Image] | None = None


class Picture(NamedTuple):
    """An image of a sample, as pixels or as features that were computed before.

    Attributes:
        content: Pixels fp32 ``[3, H, W]``, or features bf16 ``[S, C]`` from disk.
        digest: SHA-256 of the image's bytes and the view's name, the key of the features on disk;
            ``""`` if features are not kept.
    """

    content: Tensor
    digest: str


class Example(NamedTuple):
    """A sample for :func:`collate`.

    Attributes:
        dialogue: Tokens of the sample.
        pictures: Images of the sample.
        faults: Messages about the samples that were skipped before this one.
    """

    dialogue: Dialogue
    pictures: list[Picture]
    faults: list[str]


@dataclass(frozen=True)
class PictureReader:
    """A reader that decodes an image into pixels, or returns its features if they are on disk.

    Attributes:
        encoder: Encoder that crops and normalises the image.
        shards: Features on disk; ``None`` decodes every image.
    """

    encoder: VisionEncoder
    shards: FeatureShards | None = None

    def __call__(
        self, source: Path | bytes, cut: Callable[[Image.Image], Image.Image], view: str
    ) -> Picture:
        """Read one image.

        Args:
            source: Path of the image file, or its bytes.
            cut: Function that cuts the view out of the image.
            view: Name of the view, which the digest includes.

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
    """A map-style dataset of a prepared split, with one item per sample and view.

    If an image of a sample cannot be read, the item is the next sample, with a message about the
    fault. Every process therefore makes the same number of steps.

    Args:
        prepared: Split from :func:`~visproj.vlm.preparing.prepare`.
        encode: Encoder that turns texts into tokens.
        read: Reader of image files.
        views: Views of each sample.
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
        """Number of tokens of every item, visual tokens included."""
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
        raise InputError(f"cannot read the images of {len(faults)} samples in a row: {faults[0]}")

    def _picture(self, source: Path | bytes, view: int, row: int) -> Picture:
        cut = self.views.cut
        if cut is None:
            return self._read(source, _whole, "")
        # A function's name is the same in every process. Its repr is not: it has an address.
        name = f"{cut.__module__}.{cut.__qualname__} {view} {row}"
        return self._read(source, lambda image: cut(image, view, row), name)


def _whole(image: Image.Image) -> Image.Image:
    return image


class StreamedSamples(IterableDataset[Example]):
    """An endless dataset of a stream's samples: each pass over the rows has another order.

    Iterating raises ``InputError`` if a pass yields no sample that can be used.

    Args:
        rows: ``datasets.IterableDataset`` with this process's part of the rows.
        columns: Columns from :meth:`Columns.found_in`, or the user's choice if the stream does not
            say which columns it has.
        prompt: The question that captions answer.
        encode: Encoder that turns texts into tokens.
        read: Reader of the images' bytes.
        seed: Seed of the order.
        alternatives: Whether a sample may have several answers; otherwise only the first is used.
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
            # Not set_epoch: loader workers share its counter, so one would change another's order.
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
                return  # more workers than shards: this one has no rows
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
            raise InputError(f"it has no answer, only {', '.join(values)}")
        if not self._alternatives:
            sample = Sample(sample.questions, [answers[:1] for answers in sample.answers])
        images = _streamed_images(values.get(columns.image) if columns.image else None)
        dialogue, _ = self._encode(sample, len(images))
        return Example(dialogue, [self._read(image, _whole, "") for image in images], [])


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's fields and those of its ``json``, except an image if the row has its own."""
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
    """Collate examples into one batch, padded on the right.

    Returns:
        The arguments of :meth:`~visproj.vlm.model.VisualLanguageModel.forward` except ``features``.
        In their place: ``contents``, a list of pixels ``[3, H, W]`` or features ``[S, C]``, and
        ``digests`` and ``faults``, lists of strings.
    """
    dialogues = [example.dialogue for example in examples]
    pictures = [picture for example in examples for picture in example.pictures]
    return {
        "input_ids": _padded((dialogue.ids for dialogue in dialogues), 0),  # never read
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
    """Return features fp32 ``[N, S, C]`` of a batch's images, and keep new ones on disk.

    Args:
        contents: Pixels ``[3, H, W]`` or features ``[S, C]`` of each image.
        digests: Digest of each image, as in :class:`Picture`.
        model: Model whose encoder turns pixels into features.
        shards: Features on disk, to which new ones are added; ``None`` keeps none.
    """
    if not contents:
        return model.no_features()
    new = [index for index, content in enumerate(contents) if content.ndim == 3]
    features: list[Tensor] = list(contents)
    if new:
        found = model.encoder.encode(torch.stack([contents[index] for index in new]))
        for index, one in zip(new, found, strict=True):
            features[index] = one
            if shards is not None:  # round them now as they will be when read from disk
                shards.put(digests[index], one)
                features[index] = one.to(torch.bfloat16)
    device = features[new[0]].device if new else features[0].device
    return torch.stack([one.to(device, torch.float32) for one in features])
