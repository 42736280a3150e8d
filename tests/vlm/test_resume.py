"""A run that is stopped, in any way, goes on from its last whole checkpoint."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from vlm.training_models import (
    SETTINGS,
    Models,
    equal,
    numbers,
    options,
    table,
    weights,
    write_captions,
    write_dialogues,
)

from visproj.errors import InputError
from visproj.vlm.checkpoints import checkpoints
from visproj.vlm.trainer import ProjectorTrainer
from visproj.vlm.training import run_training

CASES = {
    "baseline": ("baseline", {}),
    "baseline-bfloat16-accumulated": ("baseline", {"dtype": "bfloat16", "accumulate": 2}),
    "perceiver-by-length": ("perceiver", {"by_length": True}),
}


ROOT = Path(__file__).parent.parent.parent


class KilledError(Exception):
    pass


def kill_at(patches, step):
    """Have training end before an optimiser step of this number, as if the process had died."""
    training_step = ProjectorTrainer.training_step

    def dying(self, *args):
        if self.state.global_step == step:
            raise KilledError
        return training_step(self, *args)

    patches.setattr(ProjectorTrainer, "training_step", dying)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nothing stopped, by case: the folder, its data and its report."""
    folder = tmp_path_factory.mktemp("whole")
    data = {"baseline": write_captions(folder / "captions")}
    data["perceiver"] = write_dialogues(folder / "llava", 9)
    found = {}
    with pytest.MonkeyPatch.context() as patches:
        Models(patches, folder / "cache")
        for name, (kind, changes) in CASES.items():
            chosen = options(folder / name, data[kind], kind=kind)
            report = run_training(chosen, replace(SETTINGS, **changes))
            found[name] = folder / name, data[kind], report
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("step", [0, 2, 3])
def test_killed_and_resumed_to_the_bit(whole, models, tmp_path, monkeypatch, case, step):
    out, data, report = whole[case]
    kind, changes = CASES[case]
    settings = replace(SETTINGS, save_steps=1 if "accumulate" in changes else 2, **changes)
    chosen = options(tmp_path / "out", data, kind=kind)
    with monkeypatch.context() as patches:
        kill_at(patches, min(step, report.steps - 1))
        with pytest.raises(KilledError):
            run_training(chosen, settings)
    resume = bool(checkpoints(tmp_path / "out"))
    torch.rand(5)
    again = run_training(replace(chosen, resume=resume), settings)
    assert equal(weights(tmp_path / "out"), weights(out))
    assert numbers(again) == numbers(report)
    assert table(tmp_path / "out") == table(out)


SCRIPT = """
import os, signal, sys
from pathlib import Path
import pytest
from vlm.training_models import SETTINGS, Models, options
from visproj.vlm.trainer import ProjectorTrainer
from visproj.vlm.training import run_training

save = ProjectorTrainer._save_optimizer_and_scheduler

def dying(self, folder):
    if self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, folder)

ProjectorTrainer._save_optimizer_and_scheduler = dying
out, data, cache = map(Path, sys.argv[1:])
Models(pytest.MonkeyPatch(), cache)
run_training(options(out, data), SETTINGS)
"""


def test_a_process_killed_in_a_checkpoint(whole, models, tmp_path):
    out, data, report = whole["baseline"]
    arguments = [sys.executable, "-c", SCRIPT, tmp_path / "out", data, tmp_path / "cache"]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    threads = str(torch.get_num_threads())  # sums are in another order with another number
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "out" / "checkpoint-4" / "model.safetensors").is_file()
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    again = run_training(options(tmp_path / "out", data, resume=True), SETTINGS)
    assert equal(weights(tmp_path / "out"), weights(out))
    assert numbers(again) == numbers(report)


def test_more_epochs(whole, models, tmp_path):
    _, data, _ = whole["baseline"]
    chosen = options(tmp_path / "out", data)
    run_training(chosen, SETTINGS)
    report = run_training(replace(chosen, resume=True), replace(SETTINGS, epochs=3))
    assert report.steps == 6
    assert [int(row["step"]) for row in table(chosen.out) if row["loss"]] == list(range(1, 7))
    with pytest.raises(InputError, match=r"the run in .* has epochs 3, but this one has 2"):
        run_training(replace(chosen, resume=True), SETTINGS)


def test_a_finished_run_is_left_as_it_is(whole, models, tmp_path):
    _, data, _ = whole["baseline"]
    chosen = options(tmp_path / "out", data)
    first = run_training(chosen, SETTINGS)
    before = weights(chosen.out)
    again = run_training(replace(chosen, resume=True), SETTINGS)
    assert numbers(again) == numbers(first)
    assert equal(weights(chosen.out), before)


@pytest.mark.parametrize(
    ("changes", "settings", "name"),
    [
        ({"kind": "vit"}, {}, "kind"),
        ({"prompt": "Why?"}, {}, "prompt"),
        ({"held_out": 0.5}, {}, "samples"),
        ({}, {"batch": 1}, "samples per step"),
        ({}, {"learning_rate": 0.5}, "learning rate"),
        ({}, {"dtype": "bfloat16"}, "dtype"),
        ({}, {"seed": 3}, "seed"),
    ],
)
def test_another_run(whole, models, changes, settings, name):
    out, data, _ = whole["baseline"]
    before = (out / "run.json").read_text()
    with pytest.raises(InputError, match=f"the run in .* has {name} .*, but this one has"):
        run_training(options(out, data, resume=True, **changes), replace(SETTINGS, **settings))
    assert (out / "run.json").read_text() == before


def test_a_damaged_description(models, tmp_path):
    data = write_captions(tmp_path / "data")
    run_training(options(tmp_path / "out", data), SETTINGS)
    (tmp_path / "out" / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot read .*run\.json"):
        run_training(options(tmp_path / "out", data, resume=True), SETTINGS)


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "trainer_state.json"])
def test_a_full_disk_loses_nothing(whole, models, tmp_path, monkeypatch, name):
    out, data, _ = whole["baseline"]
    chosen = options(tmp_path / "out", data)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patches:
        targets = {
            "optimizer.pt": (torch, "save"),
            "model.safetensors": (sys.modules["visproj.vlm.pretrained"], "write_state"),
            "trainer_state.json": (
                sys.modules["transformers.trainer_callback"].TrainerState,
                "save_to_json",
            ),
        }
        save = ProjectorTrainer._save_checkpoint

        def filling(self, *args, **options):
            if self.state.global_step == 4:
                patches.setattr(*targets[name], full)
            return save(self, *args, **options)

        patches.setattr(ProjectorTrainer, "_save_checkpoint", filling)
        with pytest.raises(OSError, match=r"cannot save .*checkpoint-4.*checkpoint-2 is kept"):
            run_training(chosen, SETTINGS)
    run_training(replace(chosen, resume=True), SETTINGS)
    assert equal(weights(tmp_path / "out"), weights(out))


@pytest.mark.parametrize("step", [1, 3])
def test_ctrl_c_says_what_is_kept(whole, models, tmp_path, monkeypatch, step):
    _, data, _ = whole["baseline"]
    training_step = ProjectorTrainer.training_step

    def interrupted(self, *args):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return training_step(self, *args)

    monkeypatch.setattr(ProjectorTrainer, "training_step", interrupted)
    kept = "nothing is kept" if step == 1 else "checkpoint-2 is kept, go on with --resume"
    with pytest.raises(KeyboardInterrupt, match=f"stopped: {kept}"):
        run_training(options(tmp_path / "out", data), SETTINGS)


def test_a_run_without_a_checkpoint_can_begin_again(whole, models, tmp_path, monkeypatch):
    _, data, _ = whole["baseline"]
    with monkeypatch.context() as patches:
        patches.setattr(ProjectorTrainer, "training_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_training(options(tmp_path / "out", data), SETTINGS)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["kind"] == "baseline"
    run_training(options(tmp_path / "out", data), SETTINGS)


def test_a_marker_is_written_last(tmp_path):
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-12" / "complete").touch()
    (tmp_path / "checkpoint-x").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-12"]
    from visproj.vlm.checkpoints import mark_complete, remove_incomplete

    remove_incomplete(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-12"}
    folder.mkdir()
    mark_complete(folder)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-7", "checkpoint-12"]
    assert os.listdir(folder) == ["complete"]
    assert Path(folder, "complete").read_text() == ""
