"""Small training runs, whole or cut short, and what of them has to be the same."""

import csv

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from vlm.tiny import PROMPT, tiny_model

from visproj.vlm.loop import TrainingData, TrainingSettings, train

# Unequal lengths, and unequal numbers: every photograph trains one caption a view.
CAPTIONS = [["a cat", "a red dog sat on a cat"], ["a dog"], ["red cat", "at", "og a red at cat"]]
CONFIGURATIONS = {
    "baseline-float32": ("baseline", "float32", 1),
    "baseline-bfloat16-accumulated": ("baseline", "bfloat16", 2),
    "perceiver-bfloat16": ("perceiver", "bfloat16", 1),
    "perceiver-float32-accumulated": ("perceiver", "float32", 2),
}
STEPS = 6  # of every run of `fit`: two epochs of three


def random_data(views=2):
    """Random features of three photographs; the first number of each tells its view."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(3, views, 17, 32, generator=generator)
    features[:, :, 0, 0] = torch.arange(3 * views).reshape(3, views)
    return TrainingData(list(features), CAPTIONS, PROMPT)


def settings(**changes):
    """No default is relied on."""
    chosen = {
        "epochs": 2,
        "learning_rate": 1e-2,
        "batch": 2,
        "accumulate": 1,
        "warmup": 0.2,
        "weight_decay": 0.01,
        "clip": 1.0,
        "dtype": "float32",
        "save_every": 2,
        "seed": 0,
    }
    return TrainingSettings(**{**chosen, **changes})


def weights(model):
    return {name: tensor.clone() for name, tensor in model.projector.state_dict().items()}


def equal(one, other):
    """Whether two state dicts are the same to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def fit(folder, configuration="baseline-float32", data=None, model=None, **options):
    """Train for six steps; the model and what of the run another one has to repeat."""
    kind, dtype, accumulate = CONFIGURATIONS[configuration]
    model = model or tiny_model(kind)

    def evaluate():
        return sum(p.double().square().sum().item() for p in model.projector.parameters())

    run = train(
        model,
        data or random_data(2 * accumulate),
        settings(dtype=dtype, accumulate=accumulate),
        folder,
        **{"evaluate": evaluate, **options},
    )
    return model, outcome(model, run)


def outcome(model, run):
    log = [step._replace(images_per_second=0) for step in run.steps]
    return weights(model), log, run.held_out, run.total


def assert_same(got, want):
    assert equal(got[0], want[0])
    assert got[1:] == want[1:]


class KilledError(Exception):
    pass


def dying(step):
    def on_step(done, run):
        if done.step == step:
            raise KilledError

    return on_step


def scalars(folder, tag):
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def table(folder):
    with (folder / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))
