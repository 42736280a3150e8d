"""What takes seconds to load, once a worker."""

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


@pytest.fixture
def models(monkeypatch, tmp_path):
    """Tiny models in place of the real ones, in ``run_training`` alone."""
    from vlm.training_models import Models

    return Models(monkeypatch, tmp_path / "cache")


@pytest.fixture
def data(tmp_path):
    """A folder with six photographs and their captions."""
    from vlm.training_models import write_captions

    return write_captions(tmp_path / "data")
