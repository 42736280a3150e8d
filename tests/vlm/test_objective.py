"""The training loss, against plain forward passes over one answer at a time."""

import pytest
import torch
import torch.nn.functional as F
from vlm.tiny import PROMPT, tiny_language_model, tiny_model, tiny_photograph

from visproj.vlm.compose import IGNORE_INDEX
from visproj.vlm.loading import Example, Picture, collate, encoded
from visproj.vlm.objective import takes_branches, visible_tokens
from visproj.vlm.preparing import DialogueEncoder
from visproj.vlm.samples import Sample

KINDS = ("baseline", "vit", "perceiver")
# Numbers of images; one answer, three alternatives, several turns, alternatives after them.
SAMPLES = [
    (1, Sample([PROMPT], [["a cat"]])),
    (1, Sample(["red dog"], [["a cat", "the red dog ran", "dog"]])),
    (2, Sample(["first <image>, then <image>?", "why"], [["a cat"], ["red"]])),
    (0, Sample(["what is red?"], [["a dog"]])),
    (1, Sample([PROMPT, "and now?"], [["a dog"], ["a cat sat", "og"]])),
]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def collated(model, samples, seed=0):
    encode = DialogueEncoder(model, None)
    examples = []
    for count, sample in samples:
        images = [tiny_photograph(seed := seed + 1) for _ in range(count)]
        pictures = [Picture(pixels, "") for pixels in model.encoder.preprocess(images)]
        examples.append(Example(encode(sample, count)[0], pictures, []))
    batch = collate(examples)
    del batch["faults"]
    features = encoded(batch.pop("contents"), batch.pop("digests"), model, None)
    return {"features": features, **batch}


def plain_losses(model, count, sample, features):
    """Losses of every answer token, by one forward pass per answer over all before it."""
    embed = model.language_model.get_input_embeddings()
    visual = list(model.projector(features)) if count else []
    first = [answers[0] for answers in sample.answers]
    losses = []
    *earlier, last = sample.answers
    for turn, alternatives in enumerate([*earlier, last]):
        before = model._prompts.question_ids(sample.questions, first, count)
        for text in alternatives:
            answer = model.answer_ids(text)
            ids = [token for k in range(turn) for token in before[k] + model.answer_ids(first[k])]
            ids += [*before[turn], *answer]
            images = iter(visual)
            rows = [
                next(images) if token == model.image_token_id else embed(torch.tensor(token))[None]
                for token in ids
            ]
            logits = model.language_model(
                inputs_embeds=torch.cat(rows)[None], use_cache=False
            ).logits[0]
            predicted = logits[-len(answer) - 1 : -1]
            losses.append(F.cross_entropy(predicted, torch.tensor(answer), reduction="none"))
    return torch.cat(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_plain_forward_passes(kind):
    model, plain = tiny_model(kind), tiny_model(kind)
    batch = collated(model, SAMPLES)
    out = model(**batch)
    out["loss"].backward()
    features = iter(batch["features"].split([count for count, _ in SAMPLES]))
    rows = [plain_losses(plain, count, sample, next(features)) for count, sample in SAMPLES]
    # Sums of tens of fp32 losses in other batches.
    torch.testing.assert_close(
        out["losses"], torch.stack([row.sum() for row in rows]), rtol=1e-5, atol=0
    )
    assert out["tokens"].tolist() == list(map(len, rows))
    torch.cat(rows).mean().backward()
    got, want = (
        {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
        for one in (model, plain)
    )
    assert got.keys() == want.keys()
    assert all(name.startswith("projector.") for name in got)
    # Some gradients, a key's bias for one, are rounding alone: all share one scale.
    largest = max(gradient.abs().max() for gradient in want.values())
    for name, gradient in want.items():
        assert (got[name] - gradient).abs().max() < 1e-5 * largest, name


def test_the_loss_is_divided_by_what_all_batches_have(model):
    batch = collated(model, SAMPLES[:2])
    out = model(**batch, num_items_in_batch=torch.tensor(100))
    assert out["loss"].item() == pytest.approx(out["losses"].sum().item() / 100, rel=1e-6)


def test_a_batch_without_images_reaches_every_parameter():
    model = tiny_model("perceiver")
    model(**collated(model, [SAMPLES[3]]))["loss"].backward()
    learning = [p for p in model.projector.parameters() if p.requires_grad]
    assert learning
    assert all(p.grad is not None and not p.grad.any() for p in learning)


def test_visible_tokens():
    visible = visible_tokens(torch.tensor([[1, 1, 2, 2, 3, 0]]))[0].int().tolist()
    assert visible == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]


def test_which_models_take_branches():
    assert takes_branches(tiny_language_model())
    assert takes_branches(tiny_language_model().bfloat16())

    class Flat(type(tiny_language_model())):
        """Forgets what a mask of four dimensions says."""

        def forward(self, *args, attention_mask=None, position_ids=None, **options):
            if attention_mask is not None and attention_mask.ndim == 4:
                attention_mask = None
            return super().forward(
                *args, attention_mask=attention_mask, position_ids=position_ids, **options
            )

    flat = tiny_language_model()
    flat.__class__ = Flat
    assert not takes_branches(flat)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_checkpointed_activations_change_nothing(attention):
    batches = []
    for checkpointed in (False, True):
        model = tiny_model("perceiver").train()
        model.language_model.set_attn_implementation(attention)
        if checkpointed:
            model.checkpoint_activations()
        calls = []
        layer = model.language_model.model.layers[0].self_attn
        layer.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        out = model(**collated(model, SAMPLES))
        out["loss"].backward()
        assert len(calls) == 1 + checkpointed
        assert not any(module.training for module in model.language_model.modules())
        batches.append([p.grad for p in model.projector.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*batches, strict=True))


def test_the_state_dict_holds_what_trains():
    model, other = tiny_model(), tiny_model("baseline")
    state = model.state_dict()
    assert state.keys() == {f"projector.{name}" for name in model.projector.state_dict()}
    other.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*projector"):
        other.load_state_dict({})
    prefixed = torch.nn.ModuleDict({"inner": model}).state_dict()
    assert prefixed.keys() == {f"inner.{name}" for name in state}


def test_padding_has_no_labels(model):
    batch = collated(model, SAMPLES)
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORE_INDEX).all()
