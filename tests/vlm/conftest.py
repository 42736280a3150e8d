"""What takes seconds to load, once a worker."""

import functools

import pytest


@pytest.fixture(scope="session")
def offline_encoder():
    from visproj.vlm.encoders import load_encoder

    return load_encoder()


@pytest.fixture(scope="session")
def language():
    from visproj.vlm.language import load_language_embedding

    return load_language_embedding()


@pytest.fixture(scope="session")
def photographs():
    from visproj.vlm.photographs import load_photographs

    return load_photographs()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The outcome of a run that nothing stopped, by configuration."""
    from vlm.training_runs import fit

    return functools.cache(lambda name: fit(tmp_path_factory.mktemp("whole"), name)[1])


@pytest.fixture
def fresh_event_names(monkeypatch):
    """TensorBoard orders files by second, then by a count of this process, 10 before 9."""
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


@pytest.fixture
def models(monkeypatch, tmp_path):
    """Tiny models in place of the real ones, in ``run_training`` alone."""
    from vlm.training_models import Models

    return Models(monkeypatch, tmp_path / "cache")


@pytest.fixture
def data(tmp_path):
    """A folder with three photographs and their captions."""
    from vlm.training_models import write_data

    return write_data(tmp_path / "data")
