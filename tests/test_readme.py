"""The README's examples run as they stand."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_first_example():
    from visproj import PerceiverProjector

    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    given = {
        "checkpoint": PerceiverProjector(1024, 4096).state_dict(),
        "features": torch.randn(2, 257, 1024),
        "wide_features": torch.randn(1, 769, 1024).bfloat16(),
        "text_embeds": torch.randn(2, 4, 4096),
        "input_ids": torch.tensor([[1, 7, 2, 3], [7, 4, 5, 6]]),
        "images_per_sample": [1, 1],
        "image_token_id": 7,
    }
    exec(example, given)
    assert given["sequence"].attention_mask.sum(1).tolist() == [259, 259]
    assert given["attention"].shape == (1, 32, 256, 768)
    torch.testing.assert_close(given["attention"].sum(-1), torch.ones(1, 32, 256))


def test_its_test_command_is_what_ci_runs():
    commands = re.findall(r"^pip install .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands[:2] == [
        "pip install -c constraints.txt -e '.[demo]' && visproj demo",
        "pip install -c constraints.txt -e '.[test]' && pytest",
    ]
    assert 'grep -m1 "^pip install .*&& pytest$" README.md' in (ROOT / ".ci/run").read_text()
