"""Images per second of each data format, against a plain loop: ``python -m benchmarks.loading``.

Every format has the same photographs. Loader workers decode, crop and normalise them for the
encoder, and make batches. The plain loop decodes, crops and normalises the same files in as many
processes, and makes no batches.
"""

from __future__ import annotations

import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from benchmarks.command import Parser, positive_int, run_command
from visproj import PretrainedProjector
from visproj.vlm.encoders import EncoderConfig, VisionEncoder
from visproj.vlm.language import load_language_model
from visproj.vlm.loading import PictureReader, Samples, StreamedSamples, collate
from visproj.vlm.model import VisualLanguageModel
from visproj.vlm.photographs import read_rgb
from visproj.vlm.preparing import DialogueEncoder, prepare
from visproj.vlm.samples import Columns
from visproj.vlm.sources import open_source

PROMPT = "Describe the photograph."
SIZE = (640, 480)
FORMS = ("captions", "llava", "imagefolder", "parquet", "tar")


class PixelsOnly(VisionEncoder):
    """An encoder with the preprocessing of CLIP-L/14 and without weights."""

    name = "pixels"
    config = EncoderConfig(64, 4, 64, "gelu", 1e-5, 0.0, 224, 14)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Raise, because loading needs no features."""
        raise NotImplementedError


def write_forms(folder: Path, count: int) -> dict[str, str]:
    """Write the same photographs in every format, and return the value of ``--data`` for each."""
    contents = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        small = torch.randint(256, (12, 16, 3), generator=generator, dtype=torch.uint8)
        stream = io.BytesIO()
        Image.fromarray(small.numpy()).resize(SIZE, Image.Resampling.BICUBIC).save(stream, "JPEG")
        contents.append(stream.getvalue())
    captions = [f"Photograph number {number}, in many colours." for number in range(count)]
    for form in ("captions", "llava", "imagefolder"):
        (folder / form).mkdir()
        for number, content in enumerate(contents):
            (folder / form / f"{number}.jpg").write_bytes(content)
    lines = [{"image": f"{n}.jpg", "caption": text} for n, text in enumerate(captions)]
    _write_lines(folder / "captions" / "captions.jsonl", lines)
    turns = [
        {
            "image": f"{n}.jpg",
            "conversations": [
                {"from": "human", "value": f"<image>\n{PROMPT}"},
                {"from": "gpt", "value": text},
            ],
        }
        for n, text in enumerate(captions)
    ]
    (folder / "llava" / "llava.json").write_text(json.dumps(turns), encoding="utf-8")
    named = [{"file_name": f"{n}.jpg", "caption": text} for n, text in enumerate(captions)]
    _write_lines(folder / "imagefolder" / "metadata.jsonl", named)
    _write_parquet(folder / "rows.parquet", contents, captions)
    for shard in range(2):  # one for each worker
        _write_shard(folder / f"shard-{shard}.tar", contents, captions, shard)
    return {
        "captions": str(folder / "captions"),
        "llava": str(folder / "llava" / "llava.json"),
        "imagefolder": str(folder / "imagefolder"),
        "parquet": str(folder / "rows.parquet"),
        "tar": str(folder / "shard-*.tar"),
    }


def _write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def _write_parquet(file: Path, contents: list[bytes], captions: list[str]) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    images = [{"bytes": content, "path": None} for content in contents]
    rows = datasets.Dataset.from_dict({"image": images, "caption": captions}, features)
    rows.to_parquet(file)


def _write_shard(file: Path, contents: list[bytes], captions: list[str], shard: int) -> None:
    with tarfile.open(file, "w", encoding="utf-8") as archive:
        for number in range(shard, len(contents), 2):
            for suffix, content in (("jpg", contents[number]), ("txt", captions[number].encode())):
                entry = tarfile.TarInfo(f"{number}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def batches(data: str, model: VisualLanguageModel, workers: int) -> Iterator[dict[str, Any]]:
    """Return an iterator of batches of a data set, as training takes them."""
    source = open_source(data)
    encode, read = DialogueEncoder(model, None), PictureReader(model.encoder)
    samples: Any
    if source.is_stream:
        rows = source.split("train")
        samples = StreamedSamples(rows, Columns(), PROMPT, encode, read, seed=0)
    else:
        prepared = prepare(source, "train", Columns(), PROMPT, encode)
        samples = Samples(prepared, encode, read)
    return iter(DataLoader(samples, 8, num_workers=workers, collate_fn=collate))


def loaded_per_second(data: str, model: VisualLanguageModel, workers: int, count: int) -> float:
    """Measure the images per second of loader workers, after the first batch."""
    loader = batches(data, model, workers)
    next(loader)
    begin = time.perf_counter()
    images = sum(len(batch["contents"]) for batch in islice(loader, count // 8 - 1))
    return images / (time.perf_counter() - begin)


def plain_per_second(folder: Path, encoder: VisionEncoder, processes: int) -> float:
    """Measure the images per second of a plain loop over the files, after the first eight."""
    files = sorted(folder.glob("*.jpg"))
    with Pool(processes) as pool:
        results = pool.imap_unordered(partial(_pixels, encoder), files, chunksize=8)
        for _ in range(8):
            next(results)
        begin = time.perf_counter()
        images = sum(1 for _ in results)
        return images / (time.perf_counter() - begin)


def _pixels(encoder: VisionEncoder, file: Path) -> torch.Tensor:
    torch.set_num_threads(1)
    return encoder.preprocess([read_rgb(file)])


def measure(folder: Path, count: int, workers: int, rounds: int) -> dict[str, list[float]]:
    """Measure the images per second of each format and of the plain loop in turn, every round."""
    import datasets

    datasets.disable_progress_bars()
    encoder = PixelsOnly()
    name, language_model, tokenizer = load_language_model()
    width = language_model.get_input_embeddings().weight.shape[1]
    projector = PretrainedProjector(
        "baseline", vars(encoder.config), width, encoder.name, name, PROMPT
    )
    model = VisualLanguageModel(encoder, projector, language_model, tokenizer)
    named = write_forms(folder, count)
    ways: dict[str, Callable[[], float]] = {
        "plain loop": partial(plain_per_second, folder / "captions", encoder, workers)
    }
    for form in FORMS:
        ways[form] = partial(loaded_per_second, named[form], model, workers, count)
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, call in ways.items():
            found[way].append(call())
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table."""
    parser = Parser("python -m benchmarks.loading", __doc__)
    parser.add_argument(
        "--images", type=positive_int, default=800, help="photographs in each format"
    )
    parser.add_argument("--workers", type=positive_int, default=2, help="processes that decode")
    parser.add_argument(
        "--rounds", type=positive_int, default=3, help="rounds; their medians are printed"
    )
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), max(chosen.images, 32), chosen.workers, chosen.rounds)
    plain = found["plain loop"]
    title = f"{SIZE[0]}x{SIZE[1]} JPEGs, {chosen.workers} processes, medians of {chosen.rounds}"
    table = Table("data", "images per second", "ratio to the plain loop", title=title)
    for way, speeds in found.items():
        ratio = statistics.median(a / b for a, b in zip(speeds, plain, strict=True))
        table.add_row(way, f"{statistics.median(speeds):.0f}", f"{ratio:.2f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    run_command(main)
