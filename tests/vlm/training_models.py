"""Runs of ``run_training`` between tiny models, and the data that they train on."""

import csv
import io
import json
import tarfile
from dataclasses import replace

import torch
from safetensors.torch import load_file
from vlm.tiny import TinyEncoder, tiny_language_model, tiny_photograph, tiny_tokenizer

from visproj import backend
from visproj.vlm import training
from visproj.vlm.engine import TrainingSettings
from visproj.vlm.options import TrainingOptions, TrainingReport
from visproj.vlm.scoring import Retrieval

PROMPT = "What is it?"
CAPTIONS = [["a cat", "a red cat"], ["a dog sat", "dog"], ["og a red at", "at a dog"]]
# No default is relied on.
SETTINGS = TrainingSettings(
    epochs=2,
    learning_rate=1e-2,
    batch=2,
    accumulate=1,
    warmup=0.2,
    weight_decay=0.01,
    clip=1.0,
    dtype="float32",
    save_steps=2,
    log_steps=1,
    workers=0,
    report_to=("csv",),
    seed=0,
)


def write_captions(folder, photographs=6):
    """Small images of noise and their captions."""
    folder.mkdir()
    with (folder / "captions.jsonl").open("w") as lines:
        for number in range(photographs):
            tiny_photograph(number).save(folder / f"{number}.png")
            entry = {"image": f"{number}.png", "captions": CAPTIONS[number % 3]}
            lines.write(f"{json.dumps(entry)}\n")
    return folder


def dialogue(number):
    """A conversation as LLaVA has them: no image, one, or two; one turn or two."""
    images = [f"{number}-{image}.png" for image in range(number % 3)]
    first = "<image>\n" * len(images) + "what is it?"
    turns = [
        {"from": "human", "value": first},
        {"from": "gpt", "value": CAPTIONS[number % 3][0]},
        {"from": "human", "value": "and now?"},
        {"from": "gpt", "value": CAPTIONS[(number + 1) % 3][1]},
    ]
    row = {
        "id": str(number) if number % 2 else number,
        "conversations": turns[: 2 + number % 2 * 2],
    }
    if images:
        row["image"] = images[0] if len(images) == 1 else images
    return row


def write_dialogues(folder, count=8):
    """LLaVA's JSON, with its images beside it."""
    folder.mkdir()
    rows = [dialogue(number) for number in range(count)]
    for row in rows:
        names = row.get("image", [])
        for image, name in enumerate([names] if isinstance(names, str) else names):
            tiny_photograph(10 * int(row["id"]) + image).save(folder / name)
    (folder / "llava.json").write_text(json.dumps(rows))
    return folder / "llava.json"


def write_shards(folder, count=12):
    """Two WebDataset shards of images with captions; the pattern that names them."""
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for number in range(shard, count, 2):
                image = io.BytesIO()
                tiny_photograph(number).save(image, "PNG")
                text = CAPTIONS[number % 3][0].encode()
                for suffix, content in (("png", image.getvalue()), ("txt", text)):
                    entry = tarfile.TarInfo(f"{number}.{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    return folder / "*.tar"


class Models:
    """Tiny models in place of the real ones; notes what is loaded."""

    def __init__(self, patches, cache):
        self.encoder = TinyEncoder()
        self.loaded = []
        patches.setattr(training, "load_encoder", self.load_encoder)
        patches.setattr(training, "load_language_model", self.load_language_model)
        # Where a run can be repeated to the bit.
        patches.setattr(torch.cuda, "is_available", lambda: False)
        patches.setenv("VISPROJ_CACHE_DIR", str(cache))

    def load_encoder(self, name):
        self.loaded.append(name)
        return self.encoder

    def load_language_model(self, name, dtype):
        self.loaded.append((name, dtype))
        return "tiny-llama", tiny_language_model().to(dtype), tiny_tokenizer()


def options(out, data, **changes):
    chosen = {"kind": "baseline", "queries": 5, "prompt": PROMPT, "held_out": 0.34}
    return TrainingOptions(out, data=str(data), **{**chosen, **changes})


def numbers(report):
    """What another run of the same seed has to repeat."""
    return replace(report, seconds={}, peak_mib=0)


def weights(out):
    return load_file(out / "projector" / "model.safetensors")


def equal(one, other):
    """Whether two state dicts are the same to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def table(out):
    with (out / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def no_gpu(monkeypatch):
    """What asking for Triton finds where there is no GPU and no interpreter."""
    cpu = torch.device("cpu")
    monkeypatch.setitem(backend._reasons, cpu, "the tensors are on cpu, not on a GPU")


REPORT = TrainingReport(
    kind="baseline",
    samples=48,
    steps=6,
    parameters=2_240,
    dtype="float32",
    untrained_loss=4.0,
    trained_loss=1.0,
    retrieval=Retrieval(18, 6, 0.75, 0.25, (0.125, 0.5)),
    seconds={"loading": 1.0, "reading": 20.0, "training": 90.0, "scoring": 9.0},
    peak_mib=1234.4,
)
