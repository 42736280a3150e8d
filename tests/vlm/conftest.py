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
