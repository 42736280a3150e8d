"""Runs of ``run_training`` between tiny models, and the data that they train on."""

import json
from dataclasses import replace

import torch
from vlm.tiny import TinyEncoder, tiny_language_model, tiny_photograph, tiny_tokenizer

from visproj import backend
from visproj.vlm import model as visual_language_model
from visproj.vlm import training
from visproj.vlm.loop import TrainingSettings
from visproj.vlm.scoring import Retrieval
from visproj.vlm.training import TrainingOptions, TrainingReport
from visproj.vlm.views import held_out_views

PROMPT = "What is it?"
CAPTIONS = [["a cat", "a red cat"], ["a dog sat", "dog"], ["og a red at", "at a dog"]]
VIEWS = 16  # of each of 3 photographs in training
HELD_OUT = len(held_out_views(tiny_photograph()))
STEPS = 6  # of 8 views
# No default is relied on.
SETTINGS = TrainingSettings(
    epochs=1,
    learning_rate=1e-2,
    batch=8,
    accumulate=1,
    warmup=0.2,
    weight_decay=0.01,
    clip=1.0,
    dtype="float32",
    save_every=2,
    seed=0,
)


def write_data(folder, photographs=3):
    """Small images of noise and their captions."""
    folder.mkdir()
    with (folder / "captions.jsonl").open("w") as lines:
        for number in range(photographs):
            tiny_photograph(number).save(folder / f"{number}.png")
            entry = {"image": f"{number}.png", "captions": CAPTIONS[number % 3]}
            lines.write(f"{json.dumps(entry)}\n")
    return folder


class Models:
    """Tiny models in place of the real ones; notes what is loaded."""

    def __init__(self, patches, cache):
        self.encoder = TinyEncoder()
        self.loaded = []
        patches.setattr(training, "load_encoder", self.load_encoder)
        patches.setattr(training, "load_language_model", self.load_language_model)
        patches.setattr(training, "TRAINING_VIEWS", VIEWS)
        # Where a run can be repeated to the bit.
        for module in (training, visual_language_model):
            patches.setattr(module, "default_device", lambda: torch.device("cpu"))
        patches.setenv("XDG_CACHE_HOME", str(cache))

    def load_encoder(self, name):
        self.loaded.append(name)
        return self.encoder

    def load_language_model(self, name, dtype):
        self.loaded.append((name, dtype))
        return "tiny-llama", tiny_language_model().to(dtype), tiny_tokenizer()


def options(out, data, **changes):
    return TrainingOptions("baseline", out, data, **{"queries": 5, "prompt": PROMPT, **changes})


def numbers(report):
    """What another run of the same seed has to repeat."""
    return replace(report, seconds={}, peak_mib=0)


def no_gpu(monkeypatch):
    """What asking for Triton finds where there is no GPU and no interpreter."""
    cpu = torch.device("cpu")
    monkeypatch.setitem(backend._reasons, cpu, "the tensors are on cpu, not on a GPU")


REPORT = TrainingReport(
    photographs=3,
    training_views=48,
    parameters=2_240,
    untrained_loss=4.0,
    trained_loss=1.0,
    retrieval=Retrieval(18, 6, 0.75, 0.25, (0.125, 0.5)),
    seconds={"loading": 1.0, "encoding": 20.0, "training": 90.0, "scoring": 9.0},
    peak_mib=1234.4,
)
