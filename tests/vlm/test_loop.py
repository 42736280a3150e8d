import csv
import errno
import functools
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from vlm.tiny import PROMPT, tiny_model

from visproj.vlm import loop
from visproj.vlm.loop import TrainingData, TrainingSettings, train

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The outcome of a run that nothing stopped, by configuration."""
    return functools.cache(lambda name: fit(tmp_path_factory.mktemp("whole"), name)[1])


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


@pytest.fixture
def fresh_event_names(monkeypatch):
    """TensorBoard orders files by second, then by a count of this process, 10 before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def test_the_loss_falls(tmp_path):
    model = tiny_model()
    frozen = {name: tensor.clone() for name, tensor in model.language_model.state_dict().items()}
    before = weights(model)
    run = train(model, random_data(), settings(epochs=40, save_every=1000), tmp_path)
    losses = [step.loss for step in run.steps]
    # Three photographs and six captions can be learned by heart; without the image the least loss
    # is that of the captions' own spread. Seeds 0 to 4 end at 0.09 to 0.28 of the first epoch.
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])
    assert not any(torch.equal(before[name], tensor) for name, tensor in weights(model).items())
    assert equal(frozen, model.language_model.state_dict())
    assert not model.training


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_killed_at_any_step_and_resumed(tmp_path, uninterrupted, configuration, step):
    with pytest.raises(KilledError):
        fit(tmp_path, configuration, on_step=dying(step))
    done = []
    _, got = fit(tmp_path, configuration, on_step=lambda step, run: done.append(step.step))
    assert_same(got, uninterrupted(configuration))
    assert done == list(range(step // 2 * 2 + 1, STEPS + 1))  # a checkpoint every two steps


def test_killed_again_and_again(tmp_path, uninterrupted):
    for step in (3, 3, 5, 6):
        with pytest.raises(KilledError):
            fit(tmp_path, on_step=dying(step))
    assert_same(fit(tmp_path)[1], uninterrupted("baseline-float32"))


def test_killed_in_between_the_projector_and_the_state(tmp_path, uninterrupted):
    """The projector is saved again, also where it was the last step's."""

    def killed_at_the_end():
        saves.append(1)
        if len(saves) == 3:
            raise KilledError

    saves, again = [], []
    with pytest.raises(KilledError):
        fit(tmp_path, save=killed_at_the_end)
    model = tiny_model()
    _, got = fit(tmp_path, model=model, save=lambda: again.append(weights(model)))
    assert_same(got, uninterrupted("baseline-float32"))
    assert equal(again[-1], got[0])


def test_killed_before_the_first_loss(tmp_path, uninterrupted):
    def killed():
        raise KilledError

    with pytest.raises(KilledError):
        fit(tmp_path, evaluate=killed)
    assert_same(fit(tmp_path)[1], uninterrupted("baseline-float32"))


def test_a_process_killed_without_warning(tmp_path, uninterrupted):
    script = (
        "import os, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from vlm.test_loop import fit\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "def on_step(done, run):\n"
        "    if done.step == 5:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "fit(Path(sys.argv[1]), 'perceiver-bfloat16', on_step=on_step)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(torch.load(tmp_path / "resume.pt", weights_only=True)["steps"]) == 4
    time.sleep(1.1)  # TensorBoard orders its files by second, and a new process takes longer
    _, got = fit(tmp_path, "perceiver-bfloat16")
    assert_same(got, uninterrupted("perceiver-bfloat16"))
    assert [number for number, _ in scalars(tmp_path, "train/loss")] == list(range(1, STEPS + 1))
    assert [number for number, _ in scalars(tmp_path, "held-out/loss")] == [0, 3, 6]


def test_a_finished_run_is_left_as_it_is(tmp_path, uninterrupted):
    fit(tmp_path)
    before = (tmp_path / "resume.pt").read_bytes(), (tmp_path / "metrics.csv").read_bytes()
    _, got = fit(tmp_path, save=pytest.fail, on_step=pytest.fail, evaluate=pytest.fail)
    assert_same(got, uninterrupted("baseline-float32"))
    assert before == (
        (tmp_path / "resume.pt").read_bytes(),
        (tmp_path / "metrics.csv").read_bytes(),
    )


def test_accumulation_is_a_larger_batch(tmp_path):
    """Captions of unequal lengths: the mean is over the tokens of both forwards."""
    runs = []
    for name, sizes in {"two": {"batch": 2, "accumulate": 2}, "four": {"batch": 4}}.items():
        model, gradients = tiny_model(), []

        def on_step(step, run, model=model, gradients=gradients):
            # Clipped by the same factor, so as good as the raw ones; Adam's update is no measure,
            # it makes a step of the full rate out of a gradient that is rounding alone.
            gradients.append(torch.cat([p.grad.flatten() for p in model.projector.parameters()]))

        chosen = settings(**sizes, epochs=1, warmup=0, learning_rate=1e-3)
        run = train(model, random_data(4), chosen, tmp_path / name, on_step=on_step)
        runs.append((run, gradients))
    (two, gradients_two), (four, gradients_four) = runs
    assert len(two.steps) == len(four.steps) == 3
    # fp32 sums of some hundred terms in another order: 1e-6 of their size, tenfold for the layers.
    error = (gradients_two[0] - gradients_four[0]).norm() / gradients_four[0].norm()
    assert error < 1e-5
    assert two.steps[0].gradient_norm == pytest.approx(four.steps[0].gradient_norm, rel=1e-5)
    # Later losses have had an update in between, 1e-3 at most where a gradient was only rounding.
    assert two.steps[0].loss == pytest.approx(four.steps[0].loss, rel=1e-5)
    for one, other in zip(two.steps[1:], four.steps[1:], strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-3)


def test_the_logged_loss_is_that_of_a_token_over_the_whole_step(tmp_path):
    model, data = tiny_model(), random_data()
    calls, forward = [], model.forward

    def spy(features, prompts, answers):
        log_probs, lengths = model.answer_log_probs(model.read(features, prompts), answers)
        calls.append((-log_probs.sum().item(), lengths.sum().item()))
        return forward(features, prompts, answers)

    model.forward = spy
    run = train(model, data, settings(batch=1, accumulate=6, epochs=1), tmp_path)
    assert len(calls) == 6
    assert len({tokens for _, tokens in calls}) > 1
    total, tokens = map(sum, zip(*calls, strict=True))
    # fp32 losses, added up in another order.
    assert run.steps[0].loss == pytest.approx(total / tokens, rel=1e-5)


@pytest.fixture
def seen():
    """A model whose forward only notes what it is given, as [features, prompts, answers]."""
    model, calls = tiny_model(), []
    parameter = next(model.projector.parameters())

    def forward(features, prompts, answers):
        calls.append((features[:, 0, 0].int().tolist(), prompts, answers))
        return (parameter * 0).sum() + 1

    model.forward = forward
    return model, calls


@pytest.mark.parametrize(("warmup", "rising"), [(0.2, 2), (0.0, 0), (0.04, 0), (0.06, 1)])
def test_the_learning_rate(tmp_path, seen, warmup, rising):
    run = train(seen[0], random_data(), settings(epochs=4, batch=3, warmup=warmup), tmp_path)
    assert len(run.steps) == 8
    falling = 8 - (rounded := round(warmup * 8))
    want = [(step + 1) / (rounded + 1) for step in range(rounded)]
    want += [(1 + math.cos(math.pi * step / falling)) / 2 for step in range(falling)]
    rates = [step.learning_rate for step in run.steps]
    # fp64 arithmetic on both sides.
    assert rates == pytest.approx([1e-2 * rate for rate in want], rel=1e-12)
    assert rates[rising] == max(rates) == 1e-2 if rounded == rising else True
    assert 0 < rates[-1] < 1e-3


@pytest.mark.parametrize("warmup", [0.5, 0.99])
def test_a_long_warm_up(tmp_path, seen, warmup):
    run = train(seen[0], random_data(), settings(warmup=warmup), tmp_path)
    rates = [step.learning_rate for step in run.steps]
    rising = round(warmup * 6)
    assert rates[:rising] == sorted(rates[:rising])
    assert 0 < min(rates) < max(rates) <= 1e-2


def test_the_optimiser_takes_the_rate_of_the_log(tmp_path):
    """Adam's first update is the rate itself, wherever the gradient is not tiny."""
    model = tiny_model()
    before, moved = weights(model), []

    def on_step(step, run):
        if step.step == 1:
            changes = (weights(model)[name] - before[name] for name in before)
            moved.append(max(change.abs().max().item() for change in changes))

    run = train(model, random_data(), settings(weight_decay=0, clip=1e9), tmp_path, on_step=on_step)
    # Weights of order 1 hold a change of 3e-3 to within 1e-7 of them.
    assert moved[0] == pytest.approx(run.steps[0].learning_rate, rel=1e-3)


@pytest.mark.parametrize(("batch", "accumulate", "forwards"), [(1, 1, 15), (4, 1, 4), (4, 3, 4)])
def test_every_view_once_an_epoch(tmp_path, seen, batch, accumulate, forwards):
    model, calls = seen
    chosen = settings(epochs=3, batch=batch, accumulate=accumulate)
    run = train(model, random_data(5), chosen, tmp_path)
    assert len(calls) == 3 * forwards
    assert len(run.steps) == run.total == 3 * math.ceil(forwards / accumulate)
    assert Counter(step.epoch for step in run.steps) == dict.fromkeys((1, 2, 3), run.total // 3)
    epochs = [
        [view for views, _, _ in calls[start : start + forwards] for view in views]
        for start in range(0, len(calls), forwards)
    ]
    assert all(sorted(epoch) == list(range(15)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(prompts == [PROMPT] * len(views) for views, prompts, _ in calls)


def test_every_photograph_trains_as_many_captions_as_the_poorest(tmp_path, seen):
    model, calls = seen
    captions = [["a", "b", "c", "d"], ["e", "f"], ["g", "h", "i"]]
    data = random_data(4)._replace(captions=captions)
    train(model, data, settings(epochs=10), tmp_path)
    samples = [
        (view // 4, answer)
        for views, _, answers in calls
        for view, answer in zip(views, answers, strict=True)
    ]
    assert len(samples) == 120
    assert all(len(set(answer)) == 2 for _, answer in samples)
    assert all(set(answer) <= set(captions[photograph]) for photograph, answer in samples)
    # Drawn anew each time: in 40 draws of two out of four, one is missed once in 10**12 runs.
    for photograph, own in enumerate(captions):
        drawn = Counter(text for owner, answer in samples if owner == photograph for text in answer)
        assert drawn.keys() == set(own)


def test_the_order_is_the_seeds(tmp_path, seen):
    model, calls = seen
    orders = []
    for number, seed in enumerate((0, 1, 0)):
        calls.clear()
        random.seed(number)
        torch.manual_seed(number)
        train(model, random_data(), settings(seed=seed), tmp_path / str(number))
        orders.append([(views, answers) for views, _, answers in calls])
    assert orders[0] == orders[2] != orders[1]


def table(folder):
    with (folder / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def assert_logged(folder, run):
    """The CSV has every step to the last digit, the held-out loss in the rows it belongs to."""
    rows = table(folder)
    held_out = dict(run.held_out)
    if 0 in held_out:
        first = rows.pop(0)
        assert (first["step"], first["epoch"], first["loss"]) == ("0", "0", "")
        assert float(first["held_out_loss"]) == held_out.pop(0)
    assert len(rows) == len(run.steps)
    for row, step in zip(rows, run.steps, strict=True):
        assert [float(row[name]) for name in step._fields] == list(step)
        want = held_out.get(step.step, "")
        assert (float(row["held_out_loss"]) if want else row["held_out_loss"]) == want


@pytest.mark.parametrize("evaluate", [lambda: 2.5, None], ids=["evaluated", "not evaluated"])
@pytest.mark.parametrize("killed", [None, 1, 3, 5])
def test_the_csv(tmp_path, evaluate, killed):
    options = {"evaluate": evaluate}
    runs = []
    if killed:
        with pytest.raises(KilledError):
            fit(tmp_path, on_step=dying(killed), **options)
    fit(tmp_path, on_step=lambda step, run: runs.append(run), **options)
    assert_logged(tmp_path, runs[-1])
    assert len(table(tmp_path)) == STEPS + (evaluate is not None)
    measured = [row["step"] for row in table(tmp_path) if row["held_out_loss"]]
    assert measured == (["0", "3", "6"] if evaluate else [])


@pytest.mark.parametrize("killed", [None, 1, 2, 3, 5])
def test_tensorboard(tmp_path, fresh_event_names, killed):
    if killed:
        with pytest.raises(KilledError):
            fit(tmp_path, on_step=dying(killed))
    _, (_, log, held_out, _) = fit(tmp_path)
    for name in ("loss", "learning_rate", "gradient_norm", "epoch"):
        steps, values = zip(*scalars(tmp_path, f"train/{name}"), strict=True)
        assert steps == tuple(range(1, STEPS + 1))
        # TensorBoard keeps fp32.
        assert values == pytest.approx([getattr(step, name) for step in log], rel=1e-6)
    assert all(speed > 0 for _, speed in scalars(tmp_path, "train/images_per_second"))
    steps, values = zip(*scalars(tmp_path, "held-out/loss"), strict=True)
    assert steps == (0, 3, 6)
    assert values == pytest.approx([loss for _, loss in held_out], rel=1e-6)


@pytest.mark.parametrize(("clip", "clipped"), [(1e-2, True), (1e9, False)])
def test_gradients_are_clipped(tmp_path, clip, clipped):
    model, norms = tiny_model(), []
    forward = model.forward
    if clipped:
        model.forward = lambda *arguments: 1e6 * forward(*arguments)

    def on_step(step, run):
        gradients = [p.grad.flatten() for p in model.projector.parameters()]
        norms.append((torch.cat(gradients).norm().item(), step.gradient_norm))

    train(model, random_data(), settings(clip=clip), tmp_path, on_step=on_step)
    for after, before in norms:
        # Norms of fp32 gradients, summed in another order.
        assert after == pytest.approx(min(before, clip), rel=1e-4)
        assert (before > 1e3) if clipped else (before < 1e3)


def spoiled(model, what, call):
    """From its ``call``-th forward on, the loss or one gradient is not finite."""
    forward, calls = model.forward, []
    first = next(p for p in model.projector.parameters() if p.requires_grad)

    def spy(*arguments):
        calls.append(1)
        loss = forward(*arguments)
        return loss * math.nan if what == "loss" and len(calls) >= call else loss

    def hook(gradient):
        wrong = {"infinite gradient": math.inf, "missing gradient": math.nan}.get(what)
        return None if wrong is None or len(calls) < call else torch.full_like(gradient, wrong)

    model.forward = spy
    first.register_hook(hook)


@pytest.mark.parametrize("what", ["loss", "infinite gradient", "missing gradient"])
@pytest.mark.parametrize(("step", "kept"), [(1, 0), (3, 2), (4, 2), (5, 4)])
def test_what_is_not_finite_stops_the_run(tmp_path, uninterrupted, what, step, kept):
    model, saved, last = tiny_model(), [], [weights(tiny_model())]
    spoiled(model, what, step)
    message = f"^step {step}: .*{'nan' if what != 'infinite gradient' else 'norm inf'}.* is kept"
    with pytest.raises(FloatingPointError, match=message) as raised:
        fit(
            tmp_path,
            model=model,
            save=lambda: saved.append(weights(model)),
            on_step=lambda step, run: last.append(weights(model)),
        )
    assert (f"checkpoint of step {kept}" in str(raised.value)) == bool(kept)
    assert equal(weights(model), last[-1])  # the step was not taken
    assert all(tensor.isfinite().all() for tensor in weights(model).values())
    assert len(last) == step
    assert (tmp_path / "resume.pt").exists() == bool(kept)
    if kept:
        state = torch.load(tmp_path / "resume.pt", weights_only=True)
        assert len(state["steps"]) == kept
        assert equal(state["projector"], saved[-1])
        assert equal(saved[-1], last[kept])
    # Without what was wrong, the run goes on from there as if nothing had been.
    assert_same(fit(tmp_path)[1], uninterrupted("baseline-float32"))


def test_a_photograph_whose_features_are_not_numbers(tmp_path, seen, uninterrupted):
    stub, calls = seen
    fit(tmp_path / "order", model=stub)
    fourth = calls[3][0][0]  # the view that the second epoch begins with
    first = next(number for number, (views, _, _) in enumerate(calls, 1) if fourth in views)
    data = random_data()
    data.views[fourth // 2][fourth % 2, 1:] = math.nan
    model = tiny_model()
    with pytest.raises(FloatingPointError, match=f"^step {first}: the loss is nan"):
        fit(tmp_path / "run", model=model, data=data)
    assert all(tensor.isfinite().all() for tensor in weights(model).values())
    assert_same(fit(tmp_path / "run")[1], uninterrupted("baseline-float32"))


FULL = OSError(errno.ENOSPC, "No space left on device")


def full_disk(monkeypatch, way, name):
    """From the second time that ``name`` is written, the disk is full."""
    save, replace, times = torch.save, os.replace, []

    def failing_save(state, file):
        times.append(1)
        if len(times) == 1:
            return save(state, file)
        if way == "size limit":  # of this process, a real failure in torch's own writer
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            try:
                return save(state, file)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        Path(file).write_bytes(b"half of it")
        if way == "OSError":
            raise FULL
        raise RuntimeError("[enforce fail at inline_container.cc:668] unexpected pos 64 vs 0")

    def failing_replace(source, target):
        times.extend([1] if Path(target).name == name else [])
        # metrics.csv is also written as the run begins.
        if Path(target).name == name and len(times) > (1 if name == "resume.pt" else 2):
            raise FULL
        return replace(source, target)

    if way == "replace":
        monkeypatch.setattr(os, "replace", failing_replace)
    else:
        monkeypatch.setattr(torch, "save", failing_save)


@pytest.mark.parametrize(
    ("way", "name"),
    [
        ("OSError", "resume.pt"),
        ("RuntimeError", "resume.pt"),
        ("size limit", "resume.pt"),
        ("replace", "resume.pt"),
        ("replace", "metrics.csv"),
    ],
)
def test_a_full_disk(tmp_path, monkeypatch, uninterrupted, way, name):
    with monkeypatch.context() as patches:
        full_disk(patches, way, name)
        with pytest.raises(OSError, match=rf"^cannot write {tmp_path / name}: ."):
            fit(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"resume.pt", "metrics.csv", "tensorboard"}
    state = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert len(state["steps"]) == (2 if name == "resume.pt" else 4)
    assert table(tmp_path)[-1]["step"] == "2"
    assert_same(fit(tmp_path)[1], uninterrupted("baseline-float32"))


def test_a_projector_that_cannot_be_saved(tmp_path, uninterrupted):
    saves = []

    def save():
        saves.append(1)
        if len(saves) == 2:
            raise FULL

    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path, save=save)
    assert len(torch.load(tmp_path / "resume.pt", weights_only=True)["steps"]) == 2
    assert_same(fit(tmp_path)[1], uninterrupted("baseline-float32"))


def flipped(content):
    """One bit of a weight, which torch.load takes without a word."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = {
    "half": lambda content: content[: len(content) // 2],
    "end": lambda content: content[:-1],
    "empty": lambda content: b"",
    "text": lambda content: b"not a state",
    "bit": flipped,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state(tmp_path, damage):
    with pytest.raises(KilledError):
        fit(tmp_path, on_step=dying(3))
    file = tmp_path / "resume.pt"
    file.write_bytes(damage(file.read_bytes()))
    damaged, log = file.read_bytes(), (tmp_path / "metrics.csv").read_bytes()
    with pytest.raises(ValueError, match=rf"^{file} is damaged: remove it to start again$"):
        fit(tmp_path)
    assert file.read_bytes() == damaged
    assert (tmp_path / "metrics.csv").read_bytes() == log


@pytest.mark.parametrize("content", [{"steps": []}, torch.zeros(3), [1], {"a": Path("b")}])
def test_a_state_that_is_something_else(tmp_path, content):
    torch.save(content, tmp_path / "resume.pt")
    with pytest.raises(ValueError, match=r"resume\.pt is damaged"):
        fit(tmp_path)


CHANGES = {
    "epochs": 3,
    "learning_rate": 1e-3,
    "batch": 3,
    "accumulate": 2,
    "warmup": 0.1,
    "weight_decay": 0.0,
    "clip": 2.0,
    "dtype": "bfloat16",
    "save_every": 3,
    "seed": 1,
}


def test_every_setting_is_checked_for():
    assert CHANGES.keys() == TrainingSettings.__dataclass_fields__.keys()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with a run that was killed at its third step."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(KilledError):
        fit(folder, on_step=dying(3), identity={"kind": "baseline"})
    return folder


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_with_other_settings(stopped, name):
    before, after = getattr(settings(), name), CHANGES[name]
    message = rf"resume\.pt is of a run with {name} {before}, not {after}$"
    options = {"identity": {"kind": "baseline"}}
    with pytest.raises(ValueError, match=message):
        train(tiny_model(), random_data(), settings(**{name: after}), stopped, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "Why?"}, rf"prompt {PROMPT[:-1]}\?, not Why\?"),
        ({"views": random_data().views[:2], "captions": CAPTIONS[:2]}, "photographs 3, not 2"),
        ({"views": random_data(3).views}, "training views 6, not 9"),
        ({"captions": [["a"]] * 3}, "captions [0-9a-f]{12}, not [0-9a-f]{12}"),
        (None, "kind baseline, not vit"),
    ],
)
def test_a_run_with_other_data_or_models(stopped, changes, message):
    before = (stopped / "resume.pt").read_bytes()
    kind = "vit" if changes is None else "baseline"
    data = random_data()._replace(**changes or {})
    with pytest.raises(ValueError, match=f"is of a run with {message}$"):
        fit(stopped, data=data, model=tiny_model(kind), identity={"kind": kind})
    assert (stopped / "resume.pt").read_bytes() == before


def test_a_run_with_a_projector_of_another_shape(stopped):
    with pytest.raises(
        ValueError, match=r"resume\.pt is of another projector: its weights do not fit$"
    ):
        fit(stopped, model=tiny_model("vit"), identity={"kind": "baseline"})


@pytest.mark.parametrize("views", [[], [torch.zeros(0, 17, 32)]])
def test_nothing_to_train_on(tmp_path, views):
    data = TrainingData(views, [["a cat"]] * len(views), PROMPT)
    with pytest.raises(ValueError, match="no training views"):
        train(tiny_model(), data, settings(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_global_random_state_is_left_alone(tmp_path):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    fit(tmp_path, "perceiver-bfloat16")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def test_the_random_state_decides_nothing(tmp_path, uninterrupted):
    want = uninterrupted("perceiver-bfloat16")
    torch.manual_seed(5)
    random.seed(5)
    assert_same(fit(tmp_path, "perceiver-bfloat16")[1], want)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("epochs", [0, -1], "must be at least 1"),
        ("batch", [0, -2], "must be at least 1"),
        ("accumulate", [0], "must be at least 1"),
        ("save_every", [0], "must be at least 1"),
        ("learning_rate", [0.0, -1e-3, math.inf, math.nan], "must be positive"),
        ("clip", [0.0, -1.0, math.inf, math.nan], "must be positive"),
        ("warmup", [-0.1, 1.0, math.nan], "must be at least 0 and less than 1"),
        ("weight_decay", [-0.1, math.inf, math.nan], "must be at least 0"),
        ("seed", [-1, 2**63], r"must be at least 0 and less than 2\*\*63"),
        ("dtype", ["float16", "torch.float32", ""], "must be bfloat16 or float32"),
    ],
)
def test_settings_are_checked(name, values, message):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} {message}, got {value!r}$"):
            settings(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("warmup", 0.0), ("weight_decay", 0.0), ("seed", 2**63 - 1), ("epochs", 1)]
)
def test_settings_at_their_ends(name, value):
    assert getattr(settings(**{name: value}), name) == value


def test_autocast_is_what_the_dtype_says():
    for dtype, want in {"bfloat16": torch.bfloat16, "float32": torch.float32}.items():
        with settings(dtype=dtype).autocast(torch.device("cpu")):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == want


def test_write_metrics_replaces_the_file(tmp_path):
    run = loop.TrainingRun([loop.Step(1, 1, 0.1, 0.2, 0.3, 4.0)], [(0, 5.0)], 1)
    (tmp_path / "metrics.csv").write_text("what was there\n" * 100)
    loop.write_metrics(tmp_path / "metrics.csv", run)
    assert_logged(tmp_path, run)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
