"""What tokenizers and chat templates do unasked: mended, or refused as the model is assembled."""

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from vlm.tiny import (
    END,
    PROMPT,
    TEMPLATE,
    TinyEncoder,
    tiny_language_model,
    tiny_model,
    tiny_photograph,
    tiny_projector,
    tiny_tokenizer,
)

from visproj.errors import InputError
from visproj.vlm.model import VisualLanguageModel
from visproj.vlm.prompts import PromptTokenizer

PARTS = (
    "{% for turn in messages %}{% for part in turn['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|end|>{% endfor %}"
)


def assemble(tokenizer, language=None):
    return VisualLanguageModel(
        TinyEncoder(), tiny_projector(), language or tiny_language_model(), tokenizer
    )


def adding(single, template=None):
    """The tiny tokenizer that puts more around every text, as a post-processor does."""
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_special_tokens({"bos_token": "<|user|>"})
    named = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|user|>", END)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=named
    )
    return tokenizer


class Stubborn(PreTrainedTokenizerFast):
    """Adds a beginning and an end of text even where none was wanted."""

    def __call__(self, text, **options):
        encoded = super().__call__(text, **{**options, "add_special_tokens": False})
        ids = [self.bos_token_id, *encoded.input_ids, self.eos_token_id]
        return type(encoded)({"input_ids": ids})


@pytest.mark.parametrize(("single", "begins"), [(f"$A {END}", False), (f"<|user|> $A {END}", True)])
def test_an_end_of_text_that_the_tokenizer_adds(single, begins):
    tokenizer, plain = adding(single), tiny_model(template=None)
    assert tokenizer("a").input_ids[-1] == tokenizer.eos_token_id
    model = assemble(tokenizer)
    beginning = [tokenizer.bos_token_id] if begins else []
    for prompt in (PROMPT, "", "red <image> dog"):
        assert model.prompt_ids(prompt) == [*beginning, *plain.prompt_ids(prompt)]
    assert model.answer_ids("a cat") == plain.answer_ids("a cat")
    if not begins:
        asked = [tiny_photograph()], [PROMPT]
        options = {"max_new_tokens": 6, "do_sample": False}
        assert model.generate(*asked, **options) == plain.generate(*asked, **options)
        assert plain.generate(*asked, **options) != [""]


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["bare", "chat"])
def test_a_tokenizer_that_adds_where_none_was_wanted(template):
    plain = tiny_model(template=template)
    stubborn = Stubborn(
        tokenizer_object=tiny_tokenizer().backend_tokenizer,
        eos_token=END,
        bos_token="<|assistant|>",
    )
    stubborn.chat_template = template
    model = assemble(stubborn)
    beginning = [] if template else [stubborn.bos_token_id]
    assert model.prompt_ids(PROMPT) == [*beginning, *plain.prompt_ids(PROMPT)]
    assert model.answer_ids("a cat") == plain.answer_ids("a cat")


def test_an_answer_has_one_end_of_text():
    model = tiny_model()
    ids = model.answer_ids("a cat")
    assert ids.count(model.tokenizer.eos_token_id) == 1
    assert model.answer_ids(f"a cat{END}") == model.answer_ids(f"a cat{END}{END}") == ids
    assert model.answer_ids("") == [model.tokenizer.eos_token_id]


def test_a_template_may_end_the_users_turn_with_the_end_of_text():
    model = tiny_model(
        template="{% for turn in messages %}{{ turn['content'] }}<|end|>{% endfor %}"
    )
    assert model.prompt_ids("red dog", 0)[-1] == model.tokenizer.eos_token_id


def test_a_template_that_takes_parts():
    model = tiny_model(template=PARTS)
    assert model.tokenizer.decode(model.prompt_ids("red <image> dog")) == "red <image> dog<|end|>"


def test_a_system_turn_of_the_templates_own():
    model = tiny_model(template="<|user|>You see.<|end|>" + TEMPLATE)
    ids = model.prompt_ids("red <image> dog")
    assert model.tokenizer.decode(ids).startswith("<|user|>You see.<|end|><|user|>red <image> dog")


REFUSED = {
    "drops": ("{{ 'hello' }}", "it renders 'red <image> dog' as 'hello'"),
    "strips": ("{{ messages[0]['content'] | replace('<image>', '') }}", "as 'red  dog'"),
    "escapes": ("{{ messages[0]['content'] | e }}", "as 'red &lt;image&gt; dog'"),
    "doubles": ("{{ messages[0]['content'] * 2 }}", "as 'red <image> dogred <image> dog'"),
    "adds one": ("<image>{{ messages[0]['content'] }}", "as '<image>red <image> dog'"),
    "raises": ("{{ raise_exception('a system turn first') }}", "a system turn first"),
    "is damaged": ("{% for %}", "cannot be used: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_that_is_refused(case):
    template, message = REFUSED[case]
    with pytest.raises(InputError, match="chat template cannot be used: ") as raised:
        tiny_model(template=template)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def words(unknown="[UNK]", lower=True, vocabulary=("red", "dog", "a", "cat")):
    """A lower-casing tokenizer of whole words, which drops white space."""
    tokens = [unknown, "[END]", "[PAD]", *vocabulary]
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unknown))
    inner.normalizer = normalizers.Lowercase() if lower else None
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.enable_padding(pad_id=2, pad_token="[PAD]", length=64)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token=unknown, eos_token="[END]", pad_token="[PAD]"
    )


def test_a_tokenizer_that_lower_cases_drops_white_space_and_pads():
    model = assemble(words())
    assert model.prompt_ids("RED <image>\n Dog") == [3, model.image_token_id, 4]
    assert model.answer_ids("A cat") == [5, 6, 1]
    with pytest.raises(InputError, match="the prompt ' ' has no tokens and no images"):
        model.read(model.features([]), [" "], [0])


def test_image_may_be_an_ordinary_word_of_the_vocabulary():
    tokenizer = words(vocabulary=("red", "dog", "<image>"))
    assert 5 not in tokenizer("red <image> dog").input_ids
    model = assemble(tokenizer)
    assert model.image_token_id == 5
    assert model.prompt_ids("red <image> dog") == [3, 5, 4]


def test_a_tokenizer_without_a_chat_template_attribute():
    tokenizer = tiny_tokenizer(None)

    class Bare:
        def __getattr__(self, name):
            if name == "chat_template":
                raise AttributeError(name)
            return getattr(tokenizer, name)

        def __call__(self, *texts, **options):
            return tokenizer(*texts, **options)

    ids = PromptTokenizer(Bare(), tiny_language_model()).prompt_ids(PROMPT)
    assert ids == tiny_model(template=None).prompt_ids(PROMPT)


def test_a_tokenizer_that_does_not_know_the_words():
    with pytest.raises(InputError, match="it cannot encode the words of a prompt"):
        assemble(words(vocabulary=("one", "two")))


def test_a_tokenizer_that_is_larger_than_the_models_table():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<more>"])
    rows = tiny_language_model().config.vocab_size
    with pytest.raises(InputError, match=f"token '<more>' has the id {rows}, .* {rows} embeddings"):
        assemble(tokenizer)
    padded = tiny_tokenizer()
    padded.add_special_tokens({"pad_token": "<pad>"})  # never part of a text
    assert assemble(padded).image_token_id == rows + 1


def test_an_end_of_text_from_the_models_configuration():
    tokenizer, end = tiny_tokenizer(), tiny_tokenizer().eos_token_id
    tokenizer.eos_token = None
    language = tiny_language_model()
    model = assemble(tokenizer, language)
    assert model.answer_ids("a cat")[-1] == end == tokenizer.eos_token_id


def test_no_end_of_text_at_all():
    tokenizer, language = tiny_tokenizer(), tiny_language_model()
    tokenizer.eos_token = None
    language.config.eos_token_id = language.generation_config.eos_token_id = None
    with pytest.raises(InputError, match="neither the language model nor its tokenizer has an end"):
        assemble(tokenizer, language)


def test_generation_ends_with_the_tokenizers_end_of_text():
    """Even where the model's own configuration has another one."""
    language = tiny_language_model()
    language.generation_config.eos_token_id = 5
    language.config.eos_token_id = 5
    with_end = assemble(tiny_tokenizer(), language)
    end = with_end.tokenizer.eos_token_id
    seen = []
    original = language.generate
    language.generate = lambda **options: seen.append(options) or original(**options)
    with_end.generate([tiny_photograph()], [PROMPT], max_new_tokens=2)
    assert seen[0]["eos_token_id"] == sorted({5, end})
    with_end.generate(
        [tiny_photograph()], [PROMPT], max_new_tokens=2, eos_token_id=7, pad_token_id=1
    )
    assert (seen[1]["eos_token_id"], seen[1]["pad_token_id"]) == (7, 1)


def prefixed(single):
    tokenizer = tiny_tokenizer(None)
    words = ("<|user|>", "<|assistant|>", END)
    named = [(token, tokenizer.convert_tokens_to_ids(token)) for token in words]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=named
    )
    return tokenizer


@pytest.mark.parametrize(
    "before", [["<|user|>"], ["<|assistant|>", "<|user|>"], ["<|user|>", "<|user|>"]], ids=str
)
@pytest.mark.parametrize("after", [[], [END], ["<|assistant|>"]], ids=str)
def test_all_that_a_tokenizer_puts_in_front_stays(before, after):
    """Whether or not it is the beginning of text by name; what it puts after a prompt goes."""
    tokenizer, plain = prefixed(" ".join([*before, "$A", *after])), tiny_model(template=None)
    model = assemble(tokenizer)
    beginning = tokenizer.convert_tokens_to_ids(before)
    for prompt in (PROMPT, "red <image> dog"):
        assert model.prompt_ids(prompt) == [*beginning, *plain.prompt_ids(prompt)]
    assert model.answer_ids("a cat") == plain.answer_ids("a cat")
