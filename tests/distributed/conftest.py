import pytest
from distributed.launch import Workers


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """Two processes for all the tests of a file; a failure starts new ones."""
    found = Workers(tmp_path_factory.mktemp("workers"))
    yield found
    found.kill()
