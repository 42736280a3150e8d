import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import Recorder
from vlm.tiny import PROMPT, tiny_model
from vlm.training_runs import (
    STEPS,
    KilledError,
    assert_same,
    dying,
    equal,
    fit,
    random_data,
    scalars,
    settings,
    table,
    weights,
)

from visproj.vlm import loop
from visproj.vlm.loop import Step, TrainingData, TrainingRun, train


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
        ("learning_rate", [0.0, -1e-3, math.inf, math.nan], "must be positive and finite"),
        ("clip", [0.0, -1.0, math.inf, math.nan], "must be positive and finite"),
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


def test_the_note_has_the_means_of_the_last_ten_steps():
    steps = [Step(n, 1, float(n), 1e-3, 1.0, 2.0 * n) for n in range(1, 13)]
    assert TrainingRun(steps[:1]).note() == "loss 1.000, 2.00 images/s"
    run = TrainingRun(steps, [(0, 9.0), (6, 8.5)])
    assert run.note() == "loss 7.500, 15.00 images/s, held-out 8.500"


def test_what_the_progress_receives(tmp_path):
    """Of a whole run, and of one that was killed after its first checkpoint and goes on."""
    progress = Recorder()
    with pytest.raises(KilledError):
        fit(tmp_path, on_step=dying(3), progress=progress)
    assert progress.stages == [("training", STEPS, 0)]
    assert len(progress.notes) == 3
    again = Recorder()
    fit(tmp_path, progress=again)
    assert again.stages == [("training", STEPS, 2)]
    assert len(again.notes) == STEPS - 2
