"""``run_training`` between tiny models, from the data to the report."""

import json
import shutil
from dataclasses import asdict, replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers import Recorder
from PIL import Image
from safetensors.torch import load_file
from vlm.tiny import WIDTH, TinyEncoder
from vlm.training_models import (
    PROMPT,
    SETTINGS,
    Models,
    equal,
    no_gpu,
    numbers,
    options,
    table,
    weights,
    write_captions,
    write_dialogues,
    write_shards,
)

from visproj import build_projector
from visproj.errors import InputError, NotFiniteError
from visproj.vlm import training
from visproj.vlm.engine import TrainingSettings
from visproj.vlm.options import TrainingOptions, TrainingReport, part_or_split
from visproj.vlm.pretrained import load_pretrained
from visproj.vlm.training import run_training

STEPS = 4  # two epochs of four samples in twos; two of six are held out


class Finished(NamedTuple):
    out: object
    data: object
    report: TrainingReport
    models: Models
    progress: Recorder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("finished")
    data = write_captions(folder / "data")
    progress = Recorder()
    with pytest.MonkeyPatch.context() as patches:
        models = Models(patches, folder / "cache")
        report = run_training(options(folder / "out", data), SETTINGS, progress=progress)
    return Finished(folder / "out", data, report, models, progress)


def test_the_files(finished):
    out = finished.out
    assert {path.name for path in out.iterdir()} == {
        "projector",
        "checkpoint-2",
        "checkpoint-4",
        "metrics.csv",
        "loss.png",
        "report.json",
        "run.json",
    }
    for folder in (out / "projector", out / "checkpoint-4"):
        names = {path.name for path in folder.iterdir()}
        assert {"config.json", "model.safetensors", "README.md"} <= names
    with Image.open(out / "loss.png") as picture:
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 100


def test_a_checkpoint_holds_nothing_frozen(finished):
    projector = load_file(finished.out / "projector" / "model.safetensors")
    size = sum(tensor.nbytes for tensor in projector.values())
    files = {path.name: path.stat().st_size for path in (finished.out / "checkpoint-4").iterdir()}
    assert files.keys() >= {"optimizer.pt", "scheduler.pt", "trainer_state.json", "complete"}
    # Weights, and two moments of AdamW; the rest is a few KiB.
    assert sum(files.values()) < 3 * size + 100_000
    state = torch.load(finished.out / "checkpoint-4" / "optimizer.pt", weights_only=True)
    moments = sum(entry["exp_avg"].numel() for entry in state["state"].values())
    assert moments == finished.report.parameters


def test_the_report(finished):
    out, report = finished.out, finished.report
    assert (report.kind, report.samples, report.steps) == ("baseline", 4, STEPS)
    assert report.retrieval is None
    rows = table(out)
    assert float(rows[0]["eval_loss"]) == report.untrained_loss
    assert float(rows[-1]["eval_loss"]) == report.trained_loss
    assert report.trained_loss < report.untrained_loss
    assert [int(row["step"]) for row in rows if row["loss"]] == list(range(1, STEPS + 1))
    assert set(report.seconds) == {"loading", "reading", "training"}
    assert 100 < report.peak_mib < 1e6
    projector = load_pretrained(out)
    assert report.parameters == sum(p.numel() for p in projector.parameters() if p.requires_grad)
    read = json.loads((out / "report.json").read_text())
    assert read == asdict(report)


def test_the_checkpoint_is_the_trained_projector(finished):
    trained = weights(finished.out)
    assert equal(trained, load_file(finished.out / "checkpoint-4" / "model.safetensors"))
    torch.manual_seed(SETTINGS.seed)
    untrained = build_projector("baseline", finished.models.encoder.config, WIDTH).state_dict()
    assert not any(torch.equal(untrained[key], trained[key]) for key in trained)
    projector = load_pretrained(finished.out / "checkpoint-2")
    assert (projector.kind, projector.prompt) == ("baseline", PROMPT)
    assert (projector.encoder, projector.language_model) == ("tiny", "tiny-llama")
    projector.check_encoder(finished.models.encoder)


def test_the_stages(finished):
    assert finished.progress.stages == [
        ("loading the models", 0, 0),
        ("reading the data", 0, 0),
        ("training", STEPS, 0),
    ]
    assert finished.progress.advances == [3] * STEPS


def test_the_same_seed_has_the_same_numbers(finished, models, tmp_path):
    torch.rand(3)  # where the global generator stands does not matter
    again = run_training(options(tmp_path / "again", finished.data), SETTINGS)
    assert numbers(again) == numbers(finished.report)
    assert equal(weights(tmp_path / "again"), weights(finished.out))
    other = run_training(options(tmp_path / "other", finished.data), replace(SETTINGS, seed=1))
    assert other.untrained_loss != finished.report.untrained_loss


def test_a_run_in_bfloat16_leaves_the_next_one_alone(finished, models, tmp_path):
    run_training(options(tmp_path / "low", finished.data), replace(SETTINGS, dtype="bfloat16"))
    run_training(options(tmp_path / "out", finished.data), SETTINGS)
    assert equal(weights(tmp_path / "out"), weights(finished.out))


def test_loader_workers_change_nothing(finished, models, tmp_path):
    run_training(options(tmp_path / "out", finished.data), replace(SETTINGS, workers=2))
    assert equal(weights(tmp_path / "out"), weights(finished.out))


@pytest.mark.parametrize("kind", ["vit", "perceiver"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dialogues_with_any_number_of_images(models, tmp_path, kind, dtype):
    data = write_dialogues(tmp_path / "data")
    settings = replace(SETTINGS, dtype=dtype, accumulate=2, by_length=True, epochs=6)
    report = run_training(options(tmp_path / "out", data, kind=kind), settings)
    assert report.trained_loss < report.untrained_loss
    assert models.loaded[-1] == (None, getattr(torch, dtype))


@pytest.mark.parametrize("kind", ["baseline", "vit", "perceiver"])
def test_an_encoder_without_cls(models, tmp_path, kind):
    models.encoder = TinyEncoder(has_cls=False)
    data = write_dialogues(tmp_path / "data")
    report = run_training(options(tmp_path / "out", data, kind=kind), SETTINGS)
    assert report.trained_loss < report.untrained_loss
    projector = load_pretrained(tmp_path / "out")
    assert projector.has_cls is False
    with torch.no_grad():
        tokens = projector(torch.randn(1, 16, 32))
    assert tokens.shape == (1, 25 if kind == "perceiver" else 16, WIDTH)


def test_accumulation_is_a_larger_batch(models, tmp_path):
    data = write_dialogues(tmp_path / "data")
    large = replace(SETTINGS, batch=4, weight_decay=0.0)
    losses = {}
    for name, settings in {"large": large, "small": replace(large, batch=2, accumulate=2)}.items():
        run_training(options(tmp_path / name, data, held_out=None), settings)
        losses[name] = [float(row["loss"]) for row in table(tmp_path / name)]
    # The same sums in fp32, in another order; transformers 4 logs four decimals.
    assert losses["small"] == pytest.approx(losses["large"], rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream(models, tmp_path, workers):
    """More steps than one pass over the shards has; stopped and resumed to the bit."""
    data = write_shards(tmp_path / "shards")
    chosen = options(tmp_path / "whole", data, held_out=None)
    settings = replace(SETTINGS, max_steps=8, workers=workers)
    report = run_training(chosen, settings)
    assert (report.samples, report.steps, report.untrained_loss) == (None, 8, None)
    parted = replace(chosen, out=tmp_path / "parts")
    run_training(parted, settings)
    for name in ("projector", "checkpoint-8"):
        shutil.rmtree(parted.out / name)
    run_training(replace(parted, resume=True), settings)
    assert equal(weights(parted.out), weights(chosen.out))
    assert table(parted.out) == table(chosen.out)


def test_what_a_stream_cannot_give(models, tmp_path):
    data = write_shards(tmp_path / "shards")
    settings = replace(SETTINGS, by_length=True)
    wanted = r"--max-steps is required; .* grouped by length; .* held out; --views are not"
    with pytest.raises(InputError, match=f"is read as a stream: {wanted}"):
        run_training(options(tmp_path / "out", data, views=3), settings)


def test_views_are_samples_of_their_own(models, tmp_path):
    data = write_captions(tmp_path / "data")
    report = run_training(options(tmp_path / "out", data, views=3), SETTINGS)
    assert report.samples == 12


def test_features_are_encoded_once_where_they_are_kept(models, tmp_path):
    data = write_captions(tmp_path / "data")
    chosen = options(tmp_path / "one", data, cache_features=1.0)
    run_training(chosen, SETTINGS)
    assert sum(models.encoder.batches) == 6
    run_training(replace(chosen, out=tmp_path / "two"), replace(SETTINGS, workers=1))
    assert sum(models.encoder.batches) == 6
    run_training(options(tmp_path / "three", data), SETTINGS)
    assert sum(models.encoder.batches) > 12, "not kept unless asked for"


def test_retrieval_on_request(models, tmp_path):
    data = write_captions(tmp_path / "data")
    report = run_training(options(tmp_path / "out", data, retrieval=True), SETTINGS)
    assert (report.retrieval.views, report.retrieval.captions) == (2, 4)
    assert "scoring" in report.seconds
    data = write_dialogues(tmp_path / "llava", 2)  # without and with one image
    with pytest.raises(InputError, match="retrieval needs held-out samples with one image"):
        run_training(options(tmp_path / "none", data, retrieval=True, held_out=0.5), SETTINGS)


def test_losses_by_steps(models, tmp_path):
    data = write_captions(tmp_path / "data")
    run_training(options(tmp_path / "out", data), replace(SETTINGS, eval_steps=1))
    measured = [int(row["step"]) for row in table(tmp_path / "out") if row["eval_loss"]]
    assert measured == [0, 1, 2, 3, 4]


def test_a_second_stage(finished, models, tmp_path):
    data = write_dialogues(tmp_path / "llava")
    chosen = options(tmp_path / "out", data, kind=None, from_projector=finished.out)
    report = run_training(chosen, replace(SETTINGS, learning_rate=1e-9))
    assert report.kind == "baseline"
    before, after = weights(finished.out), weights(tmp_path / "out")
    for name, tensor in before.items():  # four steps of 1e-9
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-7)
    with pytest.raises(InputError, match="is a baseline, and a vit was asked for"):
        run_training(replace(chosen, out=tmp_path / "vit", kind="vit"), SETTINGS)
    models.encoder = TinyEncoder(side=32)
    with pytest.raises(InputError, match="was trained with the encoder tiny, not with tiny"):
        run_training(replace(chosen, out=tmp_path / "wide"), SETTINGS)


def test_longer_samples_are_cut_and_counted(models, tmp_path):
    data = write_dialogues(tmp_path / "llava")
    progress = Recorder()
    run_training(options(tmp_path / "out", data, max_length=60), SETTINGS, progress=progress)
    assert any("are longer than 60 tokens: their ends are cut" in n for n in progress.notes)


def test_a_damaged_image_stops_where_it_is_too_much(models, tmp_path, caplog):
    data = write_captions(tmp_path / "data", 300)
    (data / "7.png").write_bytes(b"not an image")
    run_training(options(tmp_path / "one", data), replace(SETTINGS, epochs=1))
    assert "1 of 198 samples cannot be used and are left out" in caplog.text
    assert "7.png as an image" in caplog.text
    with pytest.raises(InputError, match=r"1 of 198 samples cannot be used: .*7\.png"):
        run_training(options(tmp_path / "two", data, strict=True), replace(SETTINGS, epochs=1))
    for number in range(20, 40):
        (data / f"{number}.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"of 198 samples cannot be used: .*; and"):
        run_training(options(tmp_path / "many", data), replace(SETTINGS, log_steps=50))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run(models, tmp_path, monkeypatch, what):
    data = write_captions(tmp_path / "data")
    from visproj.vlm.trainer import ProjectorTrainer

    step = ProjectorTrainer.training_step

    def spoiled(self, model, inputs, *args):
        if self.state.global_step == 2:
            if what == "loss":
                inputs["contents"][0].fill_(np.nan)
            else:
                next(self.projector.parameters()).register_hook(lambda grad: grad * np.inf)
        return step(self, model, inputs, *args)

    monkeypatch.setattr(ProjectorTrainer, "training_step", spoiled)
    with pytest.raises(NotFiniteError, match=r"step 3: .*; checkpoint-2 is kept"):
        run_training(options(tmp_path / "out", data), SETTINGS)
    assert all(tensor.isfinite().all() for tensor in weights_of(tmp_path / "out" / "checkpoint-2"))
    assert not (tmp_path / "out" / "projector").exists()


def weights_of(folder):
    return load_file(folder / "model.safetensors").values()


def test_a_folder_that_holds_a_run(finished, models):
    with pytest.raises(FileExistsError, match="holds a training run: go on with --resume"):
        run_training(options(finished.out, finished.data), SETTINGS)


def test_nothing_to_resume(models, tmp_path):
    data = write_captions(tmp_path / "data")
    with pytest.raises(FileNotFoundError, match="holds no training run to resume"):
        run_training(options(tmp_path / "none", data, resume=True), SETTINGS)
    assert not (tmp_path / "none").exists()
    assert not models.loaded


def test_a_folder_that_is_a_file(models, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file: choose another --out"):
        run_training(options(tmp_path / "file", tmp_path), SETTINGS)


def test_a_folder_that_another_process_trains_in(models, tmp_path):
    data = write_captions(tmp_path / "data")
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".visproj.lock"),
        pytest.raises(InputError, match="another process is writing"),
    ):
        run_training(options(tmp_path / "out", data), SETTINGS)


def test_no_home_directory(finished, models, tmp_path, monkeypatch):
    monkeypatch.delenv("VISPROJ_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(training, "cache_folder", lambda: None)
    monkeypatch.setattr("visproj.vlm.preparing.cache_folder", lambda: None)
    chosen = options(tmp_path / "out", finished.data, cache_features=1.0)
    assert numbers(run_training(chosen, SETTINGS)) == numbers(finished.report)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "linear"}, "unknown kind 'linear'"),
        ({"queries": 0}, "queries must be at least 1, got 0"),
        ({"views": 0}, "views must be at least 1"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"held_out": 1.0}, "held_out must be between 0 and 1"),
        ({"cache_features": -1.0}, "cache_features must be at least 0"),
        ({"prompt": "<image> <image>"}, "has more than one <image>"),
    ],
)
def test_options_are_checked(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        options(tmp_path, tmp_path, **changes)


def test_a_part_or_a_split():
    assert [part_or_split(text) for text in (None, "0.02", "validation")] == [
        None,
        0.02,
        "validation",
    ]


def test_triton_that_cannot_run_is_reported_before_any_model_is_loaded(
    models, tmp_path, monkeypatch
):
    from visproj import use_backend

    no_gpu(monkeypatch)
    with use_backend("triton"), pytest.raises(InputError, match="not on a GPU"):
        run_training(options(tmp_path / "out", tmp_path), SETTINGS)
    assert not models.loaded


@pytest.mark.slow
def test_the_real_models_learn_two_photographs(tmp_path, monkeypatch):
    monkeypatch.setenv("VISPROJ_CACHE_DIR", str(tmp_path / "cache"))
    prepare = training.prepare
    monkeypatch.setattr(training, "prepare", lambda *a, **b: prepare(*a, **b).select([0, 1]))
    settings = TrainingSettings(epochs=2, batch=2, dtype="float32", workers=0, report_to=("csv",))
    report = run_training(TrainingOptions(tmp_path / "out", "baseline", views=4), settings)
    assert report.trained_loss < 0.9 * report.untrained_loss  # eight steps: 0.82 was seen
    assert (report.retrieval.views, report.retrieval.captions) == (10, 6)
