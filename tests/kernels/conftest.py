"""Small tiles, and new tensors that start as NaN.

The support module brings triton, and a conftest.py is imported before it is settled whether kernels
are interpreted: hence the imports inside.
"""

import pytest


@pytest.fixture
def unwritten(monkeypatch):
    """New tensors start as NaN."""
    from kernels_support import nothing_written

    nothing_written(monkeypatch)


@pytest.fixture
def tiles(monkeypatch):
    """``tiles(style)``: launchers take tiles of 32; gives the set of styles that then run."""
    from kernels_support import small_tiles

    return lambda *args, **kwargs: small_tiles(monkeypatch, *args, **kwargs)
