import pytest
import torch
import torch.nn.functional as F
from helpers import rms_error
from vlm.tiny import (
    PROMPT,
    TinyEncoder,
    tiny_language_model,
    tiny_model,
    tiny_photograph,
    tiny_projector,
    tiny_tokenizer,
)

from visproj.errors import InputError
from visproj.vlm.language import IMAGE_TOKEN
from visproj.vlm.loading import Example, collate
from visproj.vlm.model import VisualLanguageModel

KINDS = ("baseline", "vit", "perceiver")
PROMPTS = ("red dog", "What is <image> this, a cat?")
ANSWERS = (("a cat", "the red dog ran"), ("", "dog"))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def features(model):
    return model.features([tiny_photograph(seed) for seed in range(2)])


def prefix(model, features, prompt):
    """Embeddings of one sample, the visual tokens put in by hand."""
    ids = torch.tensor(model.prompt_ids(prompt, len(features)))
    embed = model.language_model.get_input_embeddings()
    images = iter(model.projector(features))
    rows = [next(images) if token == model.image_token_id else embed(token)[None] for token in ids]
    return torch.cat(rows)[None]


def plain_log_probs(model, features, prompt, answer):
    """Of every token of one answer, by one forward over everything, without cache or padding."""
    ids = torch.tensor([*model.tokenizer(answer).input_ids, model.tokenizer.eos_token_id])
    before = prefix(model, features, prompt)
    embeds = torch.cat([before, model.language_model.get_input_embeddings()(ids)[None]], 1)
    logits = model.language_model(inputs_embeds=embeds, use_cache=False).logits[0]
    return -F.cross_entropy(logits[before.shape[1] - 1 : -1], ids, reduction="none")


def loss_of(model, features, prompts, answers):
    """Mean loss per token of a batch, one image to a prompt."""
    rows = zip(prompts, answers, strict=True)
    dialogues = [model.dialogue([prompt], [list(own)]) for prompt, own in rows]
    batch = collate([Example(dialogue, [], []) for dialogue in dialogues])
    names = "input_ids", "attention_mask", "labels"
    return model(features, *(batch[name] for name in names), [1] * len(prompts))["loss"]


def gradients(model):
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_projector_learns(kind):
    model = tiny_model(kind).train()
    assert model.projector.training
    assert not any(module.training for module in model.language_model.modules())
    features = model.features([tiny_photograph()])
    loss_of(model, features, [PROMPT], [["a cat"]]).backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == set(gradients(model))
    assert all(name.startswith("projector.") for name in learning)
    assert not model.eval().projector.training


@pytest.mark.parametrize("template", [None, tiny_tokenizer().chat_template], ids=["bare", "chat"])
def test_padding_changes_nothing(template, features):
    model = tiny_model(template=template)
    answers = [["a", "the red dog ran over the cat"], ["dog " * 9, ""]]
    with torch.no_grad():
        together, lengths = model.answer_log_probs(model.read(features, PROMPTS), answers)
        for sample, prompt in enumerate(PROMPTS):
            for index, answer in enumerate(answers[sample]):
                want = plain_log_probs(model, features[sample : sample + 1], prompt, answer)
                got = together[sample, index]
                assert lengths[sample, index] == len(want)
                torch.testing.assert_close(got[: len(want)], want, rtol=1e-5, atol=1e-5)
                assert (got[len(want) :] == 0).all()


def test_several_images_a_sample(model):
    features = model.features([tiny_photograph(seed) for seed in range(3)])
    prompts = ["first <image> then <image>?", "red dog"]
    answers = [["a cat"], ["a dog ran"]]
    with torch.no_grad():
        seen = model.read(features, prompts, [2, 1])
        got, lengths = model.answer_log_probs(seen, answers)
        for sample, own in enumerate((features[:2], features[2:])):
            want = plain_log_probs(model, own, prompts[sample], answers[sample][0])
            own_got = got[sample, 0, : lengths[sample, 0]]
            torch.testing.assert_close(own_got, want, rtol=1e-5, atol=1e-5)


def test_images_go_in_front_of_a_prompt_without_placeholders(model):
    want = model.prompt_ids("<image>\n<image>\nred dog", 2)
    assert model.prompt_ids("red dog", 2) == want
    assert want.count(model.image_token_id) == 2


def test_prompt_passes_through_the_chat_template(model):
    text = model.tokenizer.decode(model.prompt_ids("red <image> dog"))
    assert text == "<|user|>red <image> dog<|end|><|assistant|>"
    bare = tiny_model(template=None)
    assert bare.tokenizer.decode(bare.prompt_ids("red <image> dog")) == "red <image> dog\n"


def test_prefix_can_be_continued_again(model, features):
    with torch.no_grad():
        seen = model.read(features, PROMPTS)
        before = [(layer.keys.clone(), layer.values.clone()) for layer in seen.cache.layers]
        first = model.answer_log_probs(seen, ANSWERS)[0]
        model.answer_log_probs(seen, [["cat"] * 5] * 2)
        again = model.answer_log_probs(seen, ANSWERS)[0]
    assert torch.equal(first, again)
    for layer, (keys, values) in zip(seen.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


@torch.no_grad()
def argmax_by_argmax(model, image, prompt, count, images=1):
    embeds = prefix(model, model.features([image] * images), prompt)
    ids = []
    for _ in range(count):
        logits = model.language_model(inputs_embeds=embeds, use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] == model.tokenizer.eos_token_id:
            break
        token = model.language_model.get_input_embeddings()(torch.tensor([[ids[-1]]]))
        embeds = torch.cat([embeds, token], 1)
    return model.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_is_the_argmax_of_every_step(kind):
    model = tiny_model(kind)
    images = [tiny_photograph(seed) for seed in range(2)]
    got = model.generate(images, PROMPTS, max_new_tokens=12, do_sample=False)
    for index, (image, prompt) in enumerate(zip(images, PROMPTS, strict=True)):
        assert got[index] == argmax_by_argmax(model, image, prompt, 12)
        assert model.generate([image], [prompt], max_new_tokens=12, do_sample=False) == [got[index]]
    assert got[0] != got[1]


def test_the_image_matters(model):
    answers = {
        model.generate([tiny_photograph(seed)], [PROMPT], max_new_tokens=8, do_sample=False)[0]
        for seed in range(4)
    }
    assert len(answers) > 1


@pytest.mark.parametrize(("prompt", "found"), [("<image><image>", 2), ("<image> <image>\n", 2)])
def test_placeholders_that_do_not_fit_the_images(model, features, prompt, found):
    with pytest.raises(ValueError, match=f"holds {found} image placeholders, .* says 1"):
        model.read(features[:1], [prompt])


def test_placeholder_in_an_answer(model, features):
    with pytest.raises(ValueError, match="the answer 'a <image>' has <image> in it"):
        model.answer_log_probs(model.read(features[:1], [PROMPT]), [["a cat", "a <image>"]])


def assemble(encoder=None, projector=None, language=None, tokenizer=None):
    return VisualLanguageModel(
        encoder or TinyEncoder(),
        projector or tiny_projector(),
        language or tiny_language_model(),
        tokenizer or tiny_tokenizer(),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_widths_that_differ(kind):
    with pytest.raises(ValueError, match=r"tokens have width 64, .* embeddings have width 32"):
        assemble(projector=tiny_projector(kind), language=tiny_language_model(32))
    wide = TinyEncoder()
    wide.config = type(wide.config)(**{**vars(wide.config), "hidden_size": 40})
    with pytest.raises(ValueError, match=r"(?s)(?=.*\b32\b).*\b40\b"):
        assemble(wide, tiny_projector(kind))


def test_image_token_is_added_once():
    tokenizer = tiny_tokenizer()
    first, size = assemble(tokenizer=tokenizer), len(tokenizer)
    second = assemble(tokenizer=tokenizer)
    assert len(tokenizer) == size == first.language_model.config.vocab_size + 1
    assert first.image_token_id == second.image_token_id == size - 1
    assert tokenizer(f"a{IMAGE_TOKEN}b").input_ids[1] == size - 1


def test_bfloat16_language_model_takes_an_fp32_projector(features):
    model = assemble(language=tiny_language_model().bfloat16())
    answers = ANSWERS[0], ANSWERS[0]
    loss = loss_of(model, features, PROMPTS, answers)
    want = loss_of(tiny_model(), features, PROMPTS, answers)
    loss.backward()
    assert {gradient.dtype for gradient in gradients(model).values()} == {torch.float32}
    assert rms_error(loss, want) < 0.02


def test_samples_without_images(model, features):
    """Text alone passes everywhere, in a batch of its own and among samples with images."""
    answers = [["a cat"], ["dog"]]
    none = model.features([])
    assert none.shape == (0, 17, 32)
    mixed = ["red dog", "What is this?"]
    with torch.no_grad():
        alone, _ = model.answer_log_probs(model.read(none, ["red dog"], [0]), [["a cat"]])
        together, _ = model.answer_log_probs(model.read(features[:1], mixed, [0, 1]), answers)
    torch.testing.assert_close(together[0].sum(), alone.sum(), rtol=1e-5, atol=0)
    options = {"max_new_tokens": 6, "do_sample": False}
    (got,) = model.generate([], ["red dog"], [0], **options)
    image = tiny_photograph()
    assert model.generate([image], mixed, [0, 1], **options)[0] == got
    assert got == argmax_by_argmax(model, image, "red dog", 6, images=0)


def test_empty_batches(model, features):
    none = model.features([])
    assert model.generate([], []) == model.generate([], [], []) == []
    assert model.compose(none, []).inputs_embeds.shape == (0, 0, 64)
    empty = model.read(none, [])
    for got in (
        model.answer_log_probs(empty, []),
        model.answer_log_probs(model.read(features, PROMPTS), [[], []]),
    ):
        assert [tensor.numel() for tensor in got] == [0, 0]


def test_answers_of_the_end_of_text_alone(model, features):
    with torch.no_grad():
        got, lengths = model.answer_log_probs(model.read(features, PROMPTS), [[""], [""]])
        want = plain_log_probs(model, features[:1], PROMPTS[0], "")
    assert lengths.tolist() == [[1], [1]]
    torch.testing.assert_close(got[0, 0], want, rtol=1e-5, atol=1e-5)


WRONG = {
    "one prompt": (
        lambda m, f: m.generate([tiny_photograph()], "dog"),
        "prompts must be a list of texts, got 'dog'",
    ),
    "one image": (lambda m, f: m.generate(tiny_photograph(), ["dog"]), "list of images, got one"),
    "no prompt": (lambda m, f: m.read(f[:1], [None]), r"prompts must be .* got \[None\]"),
    "too few images": (
        lambda m, f: m.generate([tiny_photograph()], PROMPTS),
        r"images per prompt must .* add up to 1, got \[1, 1\]",
    ),
    "too many images": (
        lambda m, f: m.read(f, ["dog"]),
        r"add up to 2, got \[1\]",
    ),
    "counts": (lambda m, f: m.read(f, ["dog"], [1, 1]), "has 2 entries for 1 prompts"),
    "negative": (lambda m, f: m.read(f, PROMPTS, [-1, 3]), r">= 0 .* 2, got \[-1, 3\]"),
    "flat features": (lambda m, f: m.read(f[0], ["dog"]), r"features must be .* shape \[17, 32\]"),
    "one answer": (
        lambda m, f: m.answer_log_probs(m.read(f, PROMPTS), "dog"),
        "must be 2 lists of texts, got 'dog'",
    ),
    "flat answers": (
        lambda m, f: m.answer_log_probs(m.read(f, PROMPTS), ["a cat", "a dog"]),
        "the answers of a sample must be a list of texts, got 'a cat'",
    ),
    "too few answers": (
        lambda m, f: m.answer_log_probs(m.read(f, PROMPTS), [["dog"]]),
        "answers must be 2 lists of texts",
    ),
    "uneven answers": (
        lambda m, f: m.answer_log_probs(m.read(f, PROMPTS), [["dog"], ["dog", "cat"]]),
        r"every sample needs the same number of answers, got \[1, 2\]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(model, features, case):
    call, message = WRONG[case]
    before = len(model.encoder.batches)
    with pytest.raises(InputError, match=message):
        call(model, features)
    assert len(model.encoder.batches) == before  # nothing was encoded for it


def test_counts_may_be_a_tensor(model, features):
    counts = torch.tensor([2, 0])
    got = model.compose(features, ["red", "dog"], counts)
    want = model.compose(features, ["red", "dog"], [2, 0])
    assert torch.equal(got.inputs_embeds, want.inputs_embeds)


def test_a_model_that_returns_more_than_tokens(model):
    images, options = [tiny_photograph()], {"max_new_tokens": 4, "do_sample": False}
    want = model.generate(images, [PROMPT], **options)
    assert model.generate(images, [PROMPT], return_dict_in_generate=True, **options) == want


@pytest.mark.parametrize("quantised", [False, True])
def test_a_folded_projector_answers(quantised):
    """Also without any parameter left."""
    projector = tiny_projector("perceiver").module.eval().fold()
    if quantised:
        projector = torch.ao.quantization.quantize_dynamic(projector)
        assert not list(projector.parameters())
    model = VisualLanguageModel(TinyEncoder(), projector, tiny_language_model(), tiny_tokenizer())
    (answer,) = model.generate([tiny_photograph()], [PROMPT], max_new_tokens=4, do_sample=False)
    assert isinstance(answer, str)
