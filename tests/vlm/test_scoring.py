import json
import math
from collections import Counter

import pytest
import torch
from helpers import Recorder
from vlm.tiny import PROMPT, tiny_model

from visproj.errors import InputError
from visproj.vlm import scoring
from visproj.vlm.scoring import caption_scores, retrieval

# The third is longer than the prompt, the last is one token and the end of text.
CAPTIONS = [
    ["a cat", "a red dog sat on a cat"],
    ["a long story of a cat and a dog that sat on a red mat, told word by word"],
    ["dog", "og a red", "c"],
]
VIEWS_OF = torch.tensor([0, 0, 1, 2, 2, 2])
CAPTIONS_OF = torch.tensor([0, 0, 1, 2, 2, 2])


@pytest.fixture(scope="module")
def model():
    return tiny_model("perceiver").eval()


@pytest.fixture(scope="module")
def views():
    """Two, one and three random views of three photographs."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, 17, 32, generator=generator) for count in (2, 1, 3)]


@torch.no_grad()
def alone(model, view, caption):
    """The caption's log-probability: one forward over everything, no cache, padding or batch."""
    prefix = model.compose(view[None], [PROMPT]).inputs_embeds
    ids = torch.tensor(model.answer_ids(caption))
    text = model.language_model.get_input_embeddings()(ids[None])
    logits = model.language_model(
        inputs_embeds=torch.cat([prefix, text], 1), use_cache=False
    ).logits[0, prefix.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[:, None]).sum().item(), len(ids)


def assert_as_alone(model, views, captions, scores, lengths):
    every = [caption for own in captions for caption in own]
    flat = [view for own in views for view in own]
    assert scores.shape == (len(flat), len(every))
    assert scores.dtype == torch.float32
    want = [[alone(model, view, caption) for caption in every] for view in flat]
    assert lengths.tolist() == [count for _, count in want[0]]
    # Sums of up to 60 fp32 log-probabilities of up to 20, out of logits with an error of 1e-5.
    torch.testing.assert_close(
        scores, torch.tensor([[score for score, _ in row] for row in want]), rtol=1e-5, atol=1e-4
    )


def test_scores_are_those_of_each_caption_alone(model, views):
    scores, lengths = caption_scores(model, views, CAPTIONS, PROMPT)
    assert_as_alone(model, views, CAPTIONS, scores, lengths)
    # The scores tell views and captions apart by far more than that tolerance.
    assert scores.std(0).min() > 0.1
    assert (scores[:, :1] - scores[:, 1:]).abs().min() > 0.1


def chunks_of(model, monkeypatch):
    """How many answers each call of `answer_log_probs` is given, filled as they happen."""
    sizes, inner = [], model.answer_log_probs

    def spy(prefix, answers):
        sizes.append([len(row) for row in answers])
        return inner(prefix, answers)

    monkeypatch.setattr(model, "answer_log_probs", spy)
    return sizes


@pytest.mark.parametrize(
    ("size", "chunks"), [(1, [1] * 6), (4, [4, 2]), (5, [5, 1]), (6, [6]), (7, [6])]
)
def test_chunks_change_nothing(model, views, monkeypatch, size, chunks):
    want, lengths = caption_scores(model, views, CAPTIONS, PROMPT)
    monkeypatch.setattr(scoring, "ANSWERS", size)
    sizes = chunks_of(model, monkeypatch)
    scores, counts = caption_scores(model, views, CAPTIONS, PROMPT)
    assert sizes == [[chunk] for _ in range(6) for chunk in chunks]
    assert torch.equal(counts, lengths)
    # Other padding, other shapes of the same fp32 products.
    torch.testing.assert_close(scores, want, rtol=1e-5, atol=1e-4)


def test_one_caption_more_than_are_scored_together(model, views, monkeypatch):
    captions = [[f"{number} cat" * (1 + number % 3) for number in range(scoring.ANSWERS)], ["dog"]]
    sizes = chunks_of(model, monkeypatch)
    few = [views[0][:1], views[1]]
    scores, lengths = caption_scores(model, few, captions, PROMPT)
    assert sizes == [[scoring.ANSWERS], [1]] * 2
    assert_as_alone(model, few, captions, scores, lengths)


def test_progress_counts_views(model, views):
    progress = Recorder()
    caption_scores(model, views, CAPTIONS, PROMPT, progress)
    assert len(progress.advances) == 6


def test_photographs_and_captions_have_to_be_as_many(model, views):
    with pytest.raises(InputError, match="views of 3 photographs and captions of 2"):
        caption_scores(model, views, CAPTIONS[:2], PROMPT)
    with pytest.raises(InputError, match="captions of a photograph must be a list of texts"):
        caption_scores(model, views, ["a cat", *CAPTIONS[1:]], PROMPT)


def test_nothing_to_score(model, views):
    nothing, unanswered = [torch.zeros(0, 17, 32)] * 3, [[]] * 3
    scores, lengths = caption_scores(model, nothing, CAPTIONS, PROMPT)
    assert scores.shape == (0, 6)
    assert lengths.tolist() == caption_scores(model, views, CAPTIONS, PROMPT)[1].tolist()
    scores, lengths = caption_scores(model, views, unanswered, PROMPT)
    assert (scores.shape, lengths.shape) == ((6, 0), (0,))
    none = torch.zeros(0, dtype=torch.long)
    with pytest.raises(InputError, match="to score"):
        retrieval(scores, lengths, VIEWS_OF, none, seed=0)


def found(picked, view_of, caption_of, seed=0):
    """Retrieval where each view's best caption is the one picked."""
    scores = torch.full((len(view_of), len(caption_of)), -2.0)
    scores[range(len(view_of)), picked] = -1.0
    lengths = torch.ones(len(caption_of), dtype=torch.long)
    return retrieval(scores, lengths, view_of, caption_of, seed)


def test_every_view_found():
    result = found([0, 1, 2, 3, 4, 5], VIEWS_OF, CAPTIONS_OF)
    assert (result.views, result.captions, result.rate) == (6, 6, 1.0)
    # Another caption of the same photograph is as right.
    assert found([1, 0, 2, 5, 5, 3], VIEWS_OF, CAPTIONS_OF).rate == 1.0


@pytest.mark.parametrize(
    ("picked", "rate"),
    [([0, 2, 2, 3, 0, 5], 4 / 6), ([2, 2, 0, 0, 0, 0], 0), ([0, 0, 0, 0, 0, 0], 2 / 6)],
)
def test_a_known_rate(picked, rate):
    # Sums of ones in fp64.
    assert found(picked, VIEWS_OF, CAPTIONS_OF).rate == pytest.approx(rate, rel=1e-12)


def test_the_control_permutes_the_photographs():
    view_of = torch.arange(4).repeat_interleave(5)
    picked = view_of.tolist()
    controls = {seed: found(picked, view_of, torch.arange(4), seed).control for seed in range(200)}
    for seed, control in controls.items():
        order = torch.randperm(20, generator=torch.Generator().manual_seed(seed)).tolist()
        right = sum(view_of[index] == view_of[other] for index, other in enumerate(order))
        assert control == pytest.approx(right.item() / 20, rel=1e-12)
    # Chance is 1/4; one control has a deviation of 0.1, the mean of 200 of 0.007: four of those.
    assert sum(controls.values()) / 200 == pytest.approx(0.25, abs=0.028)
    # The interval of 95 % holds nearly all of them; a permutation spreads as a binomial does.
    low, high = found(picked, view_of, torch.arange(4)).interval
    assert sum(low <= control <= high for control in controls.values()) >= 180


def test_the_seed_decides_the_control_and_nothing_else():
    view_of, picked = torch.arange(6), [0, 1, 2, 3, 4, 4]
    before = torch.get_rng_state()
    results = [found(picked, view_of, torch.arange(6), seed) for seed in (3, 3, 4, 5, 6)]
    assert torch.equal(torch.get_rng_state(), before)
    assert results[0] == results[1]
    assert len({result.control for result in results}) > 1
    assert len({result._replace(control=0) for result in results}) == 1


def test_the_interval_by_hand():
    """Ten views at chance 1/2: of 1024 outcomes 11 have at most one right, 56 at most two."""
    view_of = torch.tensor([0] * 5 + [1] * 5)
    for picked in ([0, 1] * 5, [0] * 10):  # also if one caption is picked for every view
        assert found(picked, view_of, torch.arange(2)).interval == (0.2, 0.8)


def test_the_interval_is_of_the_captions_that_were_picked():
    """Five views, one of photograph 1: its captions picked always meet chance 1/5, not 1/2."""
    view_of = torch.tensor([0, 0, 0, 0, 1])
    chances = {(1, 1, 1, 1, 1): 0.2, (0, 0, 0, 0, 0): 0.8, (0, 0, 0, 0, 1): 0.68}
    for picked, chance in chances.items():
        weights = [math.comb(5, k) * chance**k * (1 - chance) ** (5 - k) for k in range(6)]
        below = [sum(weights[: k + 1]) for k in range(6)]
        want = [next(k for k in range(6) if below[k] >= part) / 5 for part in (0.025, 0.975)]
        got = found(list(picked), view_of, torch.arange(2)).interval
        assert got == pytest.approx(want, rel=1e-12)


def test_one_photograph_proves_nothing():
    result = found([0, 1, 0], torch.zeros(3, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    assert result == (3, 2, 1.0, 1.0, (1.0, 1.0))


def test_a_long_caption_is_not_punished():
    """Photograph 0's has ten tokens of -1 each, photograph 1's three of -2: a larger sum."""
    scores = torch.tensor([[-10.0, -6.0], [-30.0, -6.0]])
    result = retrieval(scores, torch.tensor([10, 3]), torch.arange(2), torch.arange(2), 0)
    assert result.rate == 1.0


def test_the_result_is_plain_numbers():
    result = found([0, 1, 2, 3, 4, 5], VIEWS_OF, CAPTIONS_OF)
    text = json.loads(json.dumps(result._asdict()))
    assert text == {**result._asdict(), "interval": list(result.interval)}
    assert {type(bound) for bound in result.interval} == {float}
    assert Counter(map(type, text.values())) == {int: 2, float: 2, list: 1}
