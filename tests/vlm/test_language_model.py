"""Directories and files that are no whole causal language model: refused in one line, by name."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)
from vlm.tiny import tiny_language_model, tiny_tokenizer

from visproj.errors import InputError, MissingPackageError, VisprojError
from visproj.vlm import language
from visproj.vlm.language import load_language_model

WEIGHTS = "model.safetensors"
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    tiny_language_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def configure(**values):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def without(part):
    def change(folder):
        tensors = load_file(folder / WEIGHTS)
        kept = {name: tensor.clone() for name, tensor in tensors.items() if part not in name}
        save_file(kept, folder / WEIGHTS, {"format": "pt"})

    return change


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def removed(*names):
    return lambda folder: [(folder / name).unlink(missing_ok=True) for name in names]


def halved(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000])


DAMAGED = {
    "a pointer": (text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
    "a web page": (text(WEIGHTS, "<!doctype html>"), "is a web page"),
    "empty": (text(WEIGHTS, ""), "is empty"),
    "half": (halved, "is not an intact safetensors file"),
    "no weights": (removed(WEIGHTS), "no file named .*model.safetensors"),
    "no configuration": (removed("config.json"), "model_type"),
    "not JSON": (text("config.json", "{"), "not a valid JSON file"),
    "unknown kind": (configure(model_type="nonsense"), "model type `nonsense`"),
    "no heads": (configure(num_attention_heads=0), "cannot load the language model"),
    "width is a text": (configure(hidden_size="wide"), "cannot load the language model"),
    "no output layer": (without("lm_head"), "lacks 1 weights, such as lm_head.weight"),
    "a layer less": (without("layers.1."), "lacks 9 weights, such as model.layers.1"),
    "other shapes": (
        configure(hidden_size=32),
        "has a weight lm_head.weight whose shape does not match its configuration",
    ),
    "no tokenizer": (
        removed("tokenizer.json", "tokenizer_config.json"),
        "cannot load the language model",
    ),
    "an empty tokenizer": (text("tokenizer.json", "{}"), "cannot load the language model"),
    "a tokenizer's web page": (text("tokenizer.json", "<html>"), "cannot load the language model"),
    "code of its own": (
        lambda folder: (
            configure(model_type="own", auto_map={"AutoConfig": "own.Config"})(folder),
            text("own.py", "raise SystemExit(3)")(folder),
        ),
        "custom code",
    ),
}


def assert_refused(source, message, capfd):
    with pytest.raises(VisprojError, match=message) as raised:
        load_language_model(str(source))
    assert isinstance(raised.value, InputError)
    assert str(source) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "MISSING" not in capfd.readouterr().err


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_directory(good, tmp_path, case, capfd):
    change, message = DAMAGED[case]
    shutil.copytree(good, tmp_path / "model")
    change(tmp_path / "model")
    assert_refused(tmp_path / "model", message, capfd)


OTHER_KINDS = {
    "CLIP": (
        lambda llama: CLIPModel(
            CLIPConfig(text_config=SMALL, vision_config={**SMALL, "image_size": 16})
        ),
        "CLIPConfig",
    ),
    "T5": (
        lambda llama: T5ForConditionalGeneration(
            T5Config(vocab_size=99, d_model=32, d_ff=32, num_layers=1, num_heads=2)
        ),
        r"holds an encoder-decoder model \(t5\)",
    ),
    "BART": (
        lambda llama: BartForConditionalGeneration(
            BartConfig(vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1)
        ),
        r"holds an encoder-decoder model \(bart\)",
    ),
    "a classifier": (lambda llama: LlamaForSequenceClassification(llama), "such as lm_head.weight"),
    "no head": (lambda llama: LlamaModel(llama), "such as lm_head.weight"),
}


@pytest.mark.parametrize("case", OTHER_KINDS)
def test_another_kind_of_model(tmp_path, case, capfd):
    build, message = OTHER_KINDS[case]
    build(tiny_language_model().config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert_refused(tmp_path, message, capfd)


def test_a_whole_model_loads(good):
    name, model, tokenizer = load_language_model(str(good))
    assert name == str(good)
    want = tiny_language_model().state_dict()
    assert all(torch.equal(tensor, want[key]) for key, tensor in model.state_dict().items())
    assert tokenizer("a cat").input_ids == tiny_tokenizer()("a cat").input_ids


def test_tied_weights_are_not_missing(tmp_path):
    config = tiny_language_model().config
    config.tie_word_embeddings = True
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load_language_model(str(tmp_path))[1]
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("content", [b"", b"<html>", b"GGUF\3\0\0\0" + b"\xff" * 64, b"\0" * 64])
def test_a_file_that_is_no_gguf(tmp_path, content):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(InputError, match=str(file)):
        load_language_model(str(file))


def test_a_file_that_is_no_model(good):
    with pytest.raises(InputError, match="is neither a GGUF file nor the directory of a language"):
        load_language_model(str(good / WEIGHTS))


def test_a_package_that_the_tokenizer_needs(good, monkeypatch):
    def load(*args):
        raise ImportError("\nThe tokenizer requires the SentencePiece library\nbut it is missing")

    monkeypatch.setattr(language, "_load", load)
    with pytest.raises(MissingPackageError, match=f"{good}: The tokenizer requires the Sentence"):
        load_language_model(str(good))
