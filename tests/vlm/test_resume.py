import errno
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from vlm.tiny import PROMPT, tiny_model
from vlm.training_runs import (
    CAPTIONS,
    CONFIGURATIONS,
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

from visproj.errors import InputError, NotFiniteError
from visproj.vlm.loop import TrainingSettings, train

ROOT = Path(__file__).resolve().parents[2]


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
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from vlm.test_loop import fit\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "def on_step(done, run):\n"
        "    if done.step == 5:\n"
        "        os._exit(9)\n"
        "fit(Path(sys.argv[1]), 'perceiver-bfloat16', on_step=on_step)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 9, done.stderr
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


FULL = OSError(errno.ENOSPC, "No space left on device")


def full_disk(monkeypatch, way, name):
    """From the second time that ``name`` is written, the disk is full."""
    save, replace, times = torch.save, os.replace, []
    resource = pytest.importorskip("resource") if way == "size limit" else None

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
        file.write(b"half of it")
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
    "epochs": 1,
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


def test_a_run_goes_on_for_more_epochs(tmp_path):
    """Epochs that both runs have see the same data, each at the rates of its own run."""
    short = train(tiny_model(), random_data(), settings(warmup=0), tmp_path)
    model = tiny_model()
    longer = train(model, random_data(), settings(epochs=4, warmup=0), tmp_path)
    assert longer.steps[:STEPS] == short.steps
    assert (longer.total, len(longer.steps)) == (2 * STEPS, 2 * STEPS)
    whole = train(tiny_model(), random_data(), settings(epochs=4, warmup=0), tmp_path / "whole")
    rates = [step.learning_rate for step in whole.steps]
    assert [step.learning_rate for step in longer.steps[STEPS:]] == rates[STEPS:]
    assert longer.steps[0].loss == whole.steps[0].loss
    # What was trained for longer is a run of that length from now on, and no shorter one.
    with pytest.raises(InputError, match=r"is of a run with epochs 4, not 3$"):
        train(tiny_model(), random_data(), settings(epochs=3, warmup=0), tmp_path)
    again = train(tiny_model(), random_data(), settings(epochs=4, warmup=0), tmp_path)
    assert again.steps == longer.steps


def test_a_killed_run_with_more_epochs_is_repeated_to_the_bit(tmp_path):
    outcomes = []
    for name, die in (("whole", 0), ("killed", 9)):
        folder = tmp_path / name
        train(tiny_model(), random_data(), settings(), folder)
        if die:
            with pytest.raises(KilledError):
                train(tiny_model(), random_data(), settings(epochs=4), folder, on_step=dying(die))
        model = tiny_model()
        train(model, random_data(), settings(epochs=4), folder)
        outcomes.append(weights(model))
    assert equal(*outcomes)


@pytest.mark.parametrize("kept", [0, 2])
def test_ctrl_c_says_what_is_kept(tmp_path, uninterrupted, kept):
    def interrupt(step, run):
        if step.step == kept + 1:
            raise KeyboardInterrupt

    kind = "the checkpoint of step 2 is kept, go on with --resume" if kept else "nothing is kept"
    with pytest.raises(KeyboardInterrupt, match=f"^stopped at step {kept + 1}: {kind}$"):
        fit(tmp_path, on_step=interrupt)
    assert_same(fit(tmp_path)[1], uninterrupted("baseline-float32"))


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_held_out_loss_that_is_not_finite(tmp_path, at, value):
    losses = iter([1.0] * at + [value])
    with pytest.raises(NotFiniteError, match=f"^after step {3 * at}: .* held-out views is {value}"):
        fit(tmp_path, evaluate=lambda: next(losses))
    if at:
        assert len(torch.load(tmp_path / "resume.pt", weights_only=True)["steps"]) == 2


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
