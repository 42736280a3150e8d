"""What ``visproj train`` trains, under FSDP2 in two processes and in one."""

import pytest
from distributed.visual import alone
from vlm.tiny import tiny_projector

pytestmark = pytest.mark.distributed

KINDS = ("baseline", "vit", "perceiver")
BOUND = 1e-5  # sums in another order: some roundings of 6e-8 per step


@pytest.mark.parametrize("kind", KINDS)
def test_fully_shard(kind, workers):
    losses, state = workers.run("distributed.visual:trained", kind, seconds=300)[0]
    want, expected = alone(kind)
    assert losses == pytest.approx(want, rel=BOUND)
    assert losses[-1] < losses[0]
    for name, tensor in expected.items():
        assert (state[name] - tensor).abs().max() <= BOUND * tensor.abs().max(), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_goes_into_a_sharded_projector(kind, workers, tmp_path):
    tiny_projector(kind, seed=5).save_pretrained(tmp_path)
    assert all(workers.run("distributed.visual:loaded", kind, tmp_path, seconds=300))
