"""Causal language models of many kinds against plain forwards, and those that are refused."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from vlm.tiny import TinyEncoder, tiny_photograph, tiny_projector, tiny_tokenizer

from visproj.errors import InputError
from visproj.vlm.model import VisualLanguageModel

VOCABULARY = len(tiny_tokenizer())
END = tiny_tokenizer().eos_token_id
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": END, "pad_token_id": None}
LLAMA = {
    **COMMON,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
GPT2 = {**COMMON, "n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
MAMBA = {**COMMON, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "pad_token_id": 0}
GEMMA = {**LLAMA, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
BERT = {**LLAMA, "is_decoder": True}
# Name, whether answers share its cache, class and configuration. Windows of 8 end within images.
KINDS = {
    "GPT-2, learned positions": (True, "GPT2LMHeadModel", {**GPT2, "n_positions": 128}),
    "Mistral, windows": (True, "MistralForCausalLM", {**LLAMA, "sliding_window": 8}),
    "Gemma 2, scaled embeddings": (True, "Gemma2ForCausalLM", {**GEMMA, "pad_token_id": 0}),
    "OPT, offset positions": (
        True,
        "OPTForCausalLM",
        {**LLAMA, "ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2, "pad_token_id": 1},
    ),
    "Mixtral, experts": (True, "MixtralForCausalLM", {**LLAMA, "num_local_experts": 2}),
    "Bloom, no positions": (False, "BloomForCausalLM", {**GPT2, "hidden_size": 64}),
    "Mamba, no cache": (False, "MambaForCausalLM", MAMBA),
    "RWKV, takes no mask": (False, "RwkvForCausalLM", {**MAMBA, "attention_hidden_size": 64}),
    "LFM2, convolutions": (
        False,
        "Lfm2ForCausalLM",
        {**LLAMA, "layer_types": ["conv", "full_attention"]},
    ),
}
REFUSED = {
    "bidirectional": ("BertLMHeadModel", {**LLAMA}, "is not causal: a token changes the"),
    "positions from 2": (
        "RobertaForCausalLM",
        {**BERT, "pad_token_id": 1},
        "and its forward pass give different logits",
    ),
    "encoder and decoder": (
        "T5ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 64, "d_ff": 96, "num_layers": 1, "num_heads": 2},
        "is an encoder-decoder model",
    ),
    "no generation": ("CTRLLMHeadModel", {**GPT2, "dff": 96}, "cannot be used as the language"),
    "no logits": ("LlamaModel", LLAMA, "cannot be used as the language model: "),
    "a classifier": ("LlamaForSequenceClassification", LLAMA, "cannot be used as the language"),
}
PROMPTS = ("red dog", "What is <image> this, a cat?")
ANSWERS = (("a cat", "the red dog ran over the cat"), ("", "dog"))


def build(name, values):
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return kind(kind.config_class(**values)).eval()


def assemble(language):
    width = language.get_input_embeddings().weight.shape[1]
    return VisualLanguageModel(
        TinyEncoder(), tiny_projector(width=width), language, tiny_tokenizer()
    )


def plain_rows(model, features, answers):
    """Log-probabilities by one forward per answer, without cache, padding, mask or positions."""
    rows = []
    for index, prompt in enumerate(PROMPTS):
        before = model.compose(features[index : index + 1], [prompt]).inputs_embeds
        for answer in answers[index]:
            ids = torch.tensor(model.answer_ids(answer))
            text = model.language_model.get_input_embeddings()(ids)[None]
            embeds = torch.cat([before, text], 1)
            logits = model.language_model(inputs_embeds=embeds, use_cache=False).logits[0]
            rows.append(-F.cross_entropy(logits[before.shape[1] - 1 : -1], ids, reduction="none"))
    return rows


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    shares, name, values = KINDS[request.param]
    model = assemble(build(name, values))
    return model, shares, model.features([tiny_photograph(seed) for seed in range(2)])


@pytest.mark.parametrize("answers", [ANSWERS, (("",), ("",)), (("dog " * 9,), ("a",))])
def test_log_probs_and_gradients_are_those_of_plain_forwards(kind, answers):
    model, shares, features = kind
    features = features.clone().requires_grad_()
    seen = model.read(features, PROMPTS)
    assert (seen.cache is not None) == shares
    model.answer_log_probs(seen, ANSWERS)  # changes nothing
    got, lengths = model.answer_log_probs(seen, answers)
    want = plain_rows(model, features, answers)
    for row, length, wanted in zip(got.flatten(0, 1), lengths.flatten(), want, strict=True):
        assert length == len(wanted)
        # Measured up to 6e-6 on models of this size: fp32 rounding of logits of order 10.
        torch.testing.assert_close(row[:length], wanted, rtol=1e-5, atol=3e-5)
        assert (row[length:] == 0).all()
    found, truth = (
        torch.autograd.grad(total, features, retain_graph=True)[0]
        for total in (got.sum(), torch.cat(want).sum())
    )
    assert (found - truth).abs().max() < 1e-4 * truth.abs().max()


@torch.no_grad()
def argmax_by_argmax(model, features, prompt, count):
    embeds, ids = model.compose(features, [prompt]).inputs_embeds, []
    while len(ids) < count and ids[-1:] != [END]:
        logits = model.language_model(inputs_embeds=embeds, use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
        token = model.language_model.get_input_embeddings()(torch.tensor([ids[-1:]]))
        embeds = torch.cat([embeds, token], 1)
    return model.tokenizer.decode(ids, skip_special_tokens=True)


def test_generate_is_the_argmax_of_every_step(kind):
    model, _, features = kind
    images = [tiny_photograph(seed) for seed in range(2)]
    got = model.generate(images, PROMPTS, max_new_tokens=8, do_sample=False)
    for index, prompt in enumerate(PROMPTS):
        assert got[index] == argmax_by_argmax(model, features[index : index + 1], prompt, 8)


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_be_used_is_refused_by_name(case):
    name, values, message = REFUSED[case]
    language = build(name, values)
    with pytest.raises(InputError, match=f"^{name} .*{message}|^{name} {message}"):
        assemble(language)


LIMITED = {
    "GPT-2": ("GPT2LMHeadModel", {**GPT2, "n_positions": 48}),
    "Llama": ("LlamaForCausalLM", {**LLAMA, "max_position_embeddings": 48}),
    "MPT": (
        "MptForCausalLM",
        {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 1, "n_heads": 4, "max_seq_len": 48},
    ),
}


@pytest.mark.parametrize("case", LIMITED)
def test_a_context_that_is_too_short(case):
    model = assemble(build(*LIMITED[case]))
    assert model.context_limit == 48
    features, image = model.features([tiny_photograph()]), tiny_photograph()
    prompt = "a cat?"
    used = 17 - 1 + len(model.prompt_ids(prompt))
    room = 48 - used + 1  # the last token is written, not read
    message = f"^{used} tokens of images and prompt and an answer of up to {room + 1} do not fit "
    message += f"into .* context of 48 tokens: the answer may have up to {room}$"

    fits, long = "c" * (room - 1), "c" * room
    seen = model.read(features, [prompt])
    assert torch.isfinite(model.answer_log_probs(seen, [[fits]])[0]).all()
    with pytest.raises(InputError, match=message):
        model.answer_log_probs(seen, [[long]])
    for options in ({"max_new_tokens": room}, {"max_length": 48}):
        assert len(model.generate([image], [prompt], do_sample=False, **options)) == 1
    for options in (
        {"max_new_tokens": room + 1},
        {"generation_config": transformers.GenerationConfig(max_new_tokens=room + 1)},
        {"max_length": 50},
    ):
        with pytest.raises(InputError, match=message):
            model.generate([image], [prompt], **options)
    with pytest.raises(InputError, match=r"an answer of up to 1 do not fit .* alone is too long"):
        model.read(features, ["c" * 48])


def test_a_model_without_a_limit():
    assert assemble(build("MambaForCausalLM", MAMBA)).context_limit is None
