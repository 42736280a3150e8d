"""The tests of ``pytest -m quick``."""

QUICK = {
    "test_positions.py": "all",
}
