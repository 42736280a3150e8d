import os
import sys

import pytest
import torch
from helpers import Recorder
from PIL import Image
from vlm.tiny import (
    PROMPT,
    WIDTH,
    TinyEncoder,
    tiny_language_model,
    tiny_model,
    tiny_photograph,
    tiny_projector,
    tiny_tokenizer,
)

from visproj import cli
from visproj.errors import InputError
from visproj.vlm import chat as module
from visproj.vlm import trained
from visproj.vlm.chat import (
    Answer,
    ChatOptions,
    attention_to_patches,
    find_projector,
    join_words,
    run_chat,
)
from visproj.vlm.encoders import OfflineEncoder
from visproj.vlm.language import NAME
from visproj.vlm.model import VisualLanguageModel
from visproj.vlm.pretrained import PretrainedProjector

KINDS = ("baseline", "vit", "perceiver")


@pytest.fixture
def loaded(monkeypatch):
    """Tiny models in place of all others: the names that were asked for."""
    asked = []

    def encoder(name):
        asked.append(name)
        return TinyEncoder()

    def language_model(name):
        asked.append(name)
        return "tiny-llama", tiny_language_model(), tiny_tokenizer()

    monkeypatch.setattr(trained, "load_encoder", encoder)
    monkeypatch.setattr(trained, "load_language_model", language_model)
    return asked


@pytest.fixture
def out(tmp_path):
    """What training leaves."""
    tiny_projector().save_pretrained(tmp_path / "out" / "projector")
    return tmp_path / "out"


@pytest.fixture
def photo(tmp_path):
    tiny_photograph().save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def run(monkeypatch, capsys):
    """``visproj chat`` in this process: exit status, stdout, stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["visproj", "chat", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        captured = capsys.readouterr()
        return exit_info.value.code, captured.out, captured.err

    return call


def generated(images=1, prompt=PROMPT, **options):
    photos = [tiny_photograph(seed) for seed in range(images)]
    (text,) = tiny_model().generate(photos, [prompt], [images], do_sample=False, **options)
    return text


def feed(text, extra=()):
    tokenizer = tiny_tokenizer()
    pieces = []
    answer = Answer(tokenizer, pieces.append)
    answer.put(torch.zeros(1, 0, dtype=torch.long))
    for token in (*tokenizer(text).input_ids, *extra):
        answer.put(torch.tensor([token]))
    answer.end()
    return answer, pieces, tokenizer


@pytest.mark.parametrize(
    "text", ["a red cat", " the dog\n\nran . ", "né 🙂\n🙂🙂 犬 ﬁ", "", "tail\ufffd"]
)
def test_pieces_add_up_to_the_text(text):
    answer, pieces, tokenizer = feed(text, [tiny_tokenizer().eos_token_id])
    assert "".join(pieces) == answer.text == text
    assert len(answer.pieces) == len(answer.ids) == len(tokenizer(text).input_ids) + 1
    assert answer.pieces[-1] in ("", "\ufffd")


def test_character_that_was_never_finished():
    *most, _ = tiny_tokenizer()("ok 🙂").input_ids
    answer, pieces, tokenizer = feed("", most)
    assert "".join(pieces) == answer.text == tokenizer.decode(most) == "ok \ufffd"


@pytest.mark.parametrize("images", [1, 2])
def test_answer_is_streamed(loaded, out, tmp_path, images):
    paths = []
    for seed in range(images):
        paths.append(tmp_path / f"{seed}.png")
        tiny_photograph(seed).save(paths[-1])
    pieces = []
    text = run_chat(ChatOptions(out, paths, max_new_tokens=20), write=pieces.append)
    assert "".join(pieces) == text == generated(images, max_new_tokens=20)
    assert len(pieces) > 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "there is neither an image nor a prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(loaded, out, photo, changes, message):
    with pytest.raises(InputError, match=message):
        run_chat(ChatOptions(**{"projector": out, "images": [photo], **changes}))
    assert loaded == []


def test_a_panorama_is_noted(loaded, out, tmp_path, caplog):
    tiny_photograph().resize((90, 30)).save(tmp_path / "wide.png")
    run_chat(ChatOptions(out, [tmp_path / "wide.png"], max_new_tokens=1))
    assert caplog.messages == ["wide.png: the encoder sees only the middle 33 % of it"]


def test_command_writes_the_answer_and_nothing_else(loaded, run, out, photo):
    status, stdout, stderr = run("--projector", out, "--image", photo, "--max-new-tokens", 9)
    assert (status, stderr) == (0, "")
    assert stdout == generated(max_new_tokens=9) + "\n"
    progress = Recorder()
    run_chat(ChatOptions(out, [photo], max_new_tokens=1), progress=progress)
    assert [name for name, *_ in progress.stages] == [
        "loading the vision encoder",
        "loading the language model",
        "reading the images",
    ]


def test_the_users_prompt(loaded, run, out, photo):
    prompt = "a dog <image> red"
    _, stdout, _ = run("--projector", out / "projector", "--image", photo, "--prompt", prompt)
    assert stdout == generated(prompt=prompt, max_new_tokens=64) + "\n"
    assert stdout != generated(max_new_tokens=64) + "\n"


def test_models_are_the_checkpoints_unless_named(loaded, out, photo):
    options = ChatOptions(out, [photo], max_new_tokens=1)
    run_chat(options)
    assert loaded == ["tiny", "tiny-llama"]
    loaded.clear()
    run_chat(
        ChatOptions(out, [photo], encoder="x/tiny", language_model="some.gguf", max_new_tokens=1)
    )
    assert loaded == ["x/tiny", "some.gguf"]


def test_offline_models_by_their_names(loaded, out, photo, monkeypatch):
    projector = tiny_projector()
    projector.encoder, projector.language_model = OfflineEncoder.name, NAME
    monkeypatch.setattr(module, "load_pretrained", lambda directory: projector)
    monkeypatch.setattr(type(projector), "check_encoder", lambda self, encoder: None)
    run_chat(ChatOptions(out, [photo], max_new_tokens=1))
    assert loaded == [None, None]


def test_projector_or_the_folder_around_it(out):
    assert find_projector(out) == find_projector(out / "projector") == out / "projector"
    assert find_projector(out / "none") == out / "none"


def missing_projector(out, photo):
    return ["--projector", out / "none"], f"the projector directory {out / 'none'} has no config"


def damaged_projector(out, photo):
    (out / "projector" / "model.safetensors").write_bytes(b"damaged")
    return [], f"cannot load the projector in {out / 'projector'}"


def missing_image(out, photo):
    return ["--image", out / "none.png"], f"no such image: {out / 'none.png'}"


def unreadable_image(out, photo):
    photo.write_text("not an image")
    return [], f"cannot read {photo} as an image"


def other_encoder(out, photo):
    tiny_projector(encoder=TinyEncoder("clip")).save_pretrained(out / "projector")
    return [], "trained with the encoder clip, not with tiny"


def too_many_placeholders(out, photo):
    return [
        "--prompt",
        "<image> <image>",
    ], "the prompt has 2 of <image> for 1 images: "


def picture_in_no_folder(out, photo):
    message = f"no such folder for the attention picture: {out / 'none'}"
    return ["--attention", out / "none" / "a.png"], message


def picture_that_is_a_folder(out, photo):
    (out / "a.png").mkdir()
    return ["--attention", out / "a.png"], f"cannot be written: {out / 'a.png'}"


def picture_that_is_no_png(out, photo):
    return ["--attention", out / "a.txt"], "must be a .png file, got a.txt"


def attention_over_two_images(out, photo):
    return ["--image", photo, "--attention", out / "a.png"], "over exactly one image, got 2"


def unknown_backend(out, photo):
    return ["--backend", "cuda"], "'cuda'"


@pytest.mark.parametrize(
    "case",
    [
        missing_projector,
        damaged_projector,
        missing_image,
        unreadable_image,
        other_encoder,
        too_many_placeholders,
        picture_in_no_folder,
        picture_that_is_a_folder,
        picture_that_is_no_png,
        attention_over_two_images,
        unknown_backend,
    ],
    ids=lambda case: case.__name__,
)
def test_refused_before_the_language_model_is_loaded(loaded, run, monkeypatch, out, photo, case):
    monkeypatch.setattr(trained, "load_language_model", lambda name: pytest.fail("loaded"))
    arguments, message = case(out, photo)
    images = [] if case is missing_image else ["--image", photo]
    status, stdout, stderr = run("--projector", out, *images, *arguments)
    assert status in (1, 2)  # 2 for what the parser of the arguments refuses
    assert stdout == ""
    assert stderr.startswith("error: ")
    assert message in stderr
    assert stderr.count("\n") == 1


def test_folder_without_permission(loaded, run, monkeypatch, out, photo):
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (out, os.W_OK))
    arguments = ["--projector", out, "--image", photo, "--attention", out / "a.png"]
    status, _, stderr = run(*arguments)
    assert status == 1
    assert stderr == f"error: the attention picture cannot be written: {out / 'a.png'}\n"


def test_triton_where_it_cannot_run(loaded, run, monkeypatch, out, photo):
    def refuse(x):
        raise RuntimeError("the Triton backend was asked for, but there is no GPU")

    monkeypatch.setattr("visproj.vlm.model.runs_triton", refuse)
    status, _, stderr = run("--projector", out, "--image", photo, "--backend", "triton")
    assert status == 1
    assert stderr == "error: the Triton backend was asked for, but there is no GPU\n"


def test_language_model_of_another_width(loaded, run, monkeypatch, out, photo):
    models = "narrow", tiny_language_model(32), tiny_tokenizer()
    monkeypatch.setattr(trained, "load_language_model", lambda name: models)
    status, stdout, stderr = run("--projector", out, "--image", photo)
    assert (status, stdout) == (1, "")
    assert "tokens have width 64, but the language model's embeddings have width 32" in stderr


def saved(folder):
    tiny_language_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_language_model_from_a_directory(run, monkeypatch, tmp_path, out, photo):
    monkeypatch.setattr(trained, "load_encoder", lambda name: TinyEncoder())
    arguments = ["--projector", out, "--image", photo, "--language-model", saved(tmp_path / "lm")]
    status, stdout, _ = run(*arguments)
    assert status == 0
    assert stdout == generated(max_new_tokens=64) + "\n"


def by_generate(model, image, count):
    """Attention of each step's own forward with a cache, mean over layers and heads ``[T, P]``."""
    sequence = model.compose(model.features([image]), [PROMPT])
    model.language_model.set_attn_implementation("eager")
    out = model.language_model.generate(
        inputs_embeds=sequence.inputs_embeds,
        attention_mask=sequence.attention_mask,
        max_new_tokens=count,
        do_sample=False,
        output_attentions=True,
        return_dict_in_generate=True,
    )
    length = sequence.inputs_embeds.shape[1]
    rows = [
        torch.stack([layer[0, :, -1, :length] for layer in step]).mean((0, 1))
        for step in out.attentions
    ]
    return out.sequences[0].tolist(), torch.stack(rows)


def bare_model(kind):
    eye = TinyEncoder(has_cls=False)
    described = kind, vars(eye.config), WIDTH, eye.name, "tiny-llama", PROMPT
    torch.manual_seed(0)
    projector = PretrainedProjector(*described, has_cls=False)
    return VisualLanguageModel(eye, projector, tiny_language_model(), tiny_tokenizer())


@pytest.mark.parametrize("has_cls", [True, False], ids=["CLS", "no CLS"])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_that_of_the_steps_of_generate(kind, has_cls):
    build = tiny_model if has_cls else bare_model
    model, image = build(kind).eval(), tiny_photograph()
    ids, steps = by_generate(build(kind).eval(), image, 8)
    features = model.features([image])
    begin = model.prompt_ids(PROMPT).index(model.image_token_id)
    with torch.no_grad():
        if kind == "perceiver":
            _, maps = model.projector(features, return_attention=True)
            want = steps[:, begin : begin + 256] @ maps[0].mean(0)
        else:
            want = steps[:, begin + has_cls : begin + has_cls + 16]
    want = want / want.sum(1, keepdim=True)
    got = attention_to_patches(model, features, PROMPT, ids)
    assert got.shape == (len(ids), 16)
    assert (got >= 0).all()
    torch.testing.assert_close(got.sum(1), torch.ones(len(ids)))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert (got - 1 / 16).abs().max() > 1e-3


def hand_made(monkeypatch, weights, length):
    """Attention to visual tokens by their number, as from one position behind one text token."""
    row = torch.full((1, length), 0.5)
    row[0, 1:-2] = 0
    for token, weight in weights.items():
        row[0, 1 + token] = weight
    monkeypatch.setattr(module, "_attention", lambda *arguments: row)


def test_hand_made_attention_of_a_baseline(monkeypatch):
    model = tiny_model(template=None)
    hand_made(monkeypatch, {0: 0.6, 3: 0.1, 16: 0.3}, 1 + 17 + 2)
    features = model.features([tiny_photograph()])
    (got,) = attention_to_patches(model, features, " <image> a", [5])
    want = torch.zeros(16)
    want[2], want[15] = 0.25, 0.75  # CLS is left out
    torch.testing.assert_close(got, want)


def test_hand_made_attention_of_a_perceiver(monkeypatch):
    model = tiny_model("perceiver", template=None)
    maps = torch.zeros(1, 2, 256, 16)
    maps[0, 0, :, 4] = maps[0, 1, :, 9] = 1  # two heads, two patches
    maps[0, :, 7] = torch.eye(16)[11]
    forward = model.projector.forward
    monkeypatch.setattr(
        model.projector,
        "forward",
        lambda x, **options: (None, maps) if options.get("return_attention") else forward(x),
    )
    hand_made(monkeypatch, {7: 0.1, 200: 0.1, 255: 0.2}, 1 + 256 + 2)
    features = model.features([tiny_photograph()])
    (got,) = attention_to_patches(model, features, " <image> a", [5])
    want = torch.zeros(16)
    want[11], want[4], want[9] = 0.25, 0.375, 0.375
    torch.testing.assert_close(got, want)


def test_implementation_of_attention_is_put_back(monkeypatch):
    model = tiny_model()
    features = model.features([tiny_photograph()])
    config = model.language_model.config
    assert config._attn_implementation == "sdpa"
    attention_to_patches(model, features, PROMPT, [5, 6])
    assert config._attn_implementation == "sdpa"

    def broken(*arguments, **options):
        assert config._attn_implementation == "eager"
        raise RuntimeError("broken")

    monkeypatch.setattr(model.language_model, "forward", broken)
    with pytest.raises(RuntimeError, match="broken"):
        attention_to_patches(model, features, PROMPT, [5, 6])
    assert config._attn_implementation == "sdpa"


def test_model_without_attention_weights(monkeypatch):
    model = tiny_model()
    forward = model.language_model.forward
    monkeypatch.setattr(
        model.language_model,
        "forward",
        lambda **options: forward(**{**options, "output_attentions": False}),
    )
    with pytest.raises(ValueError, match="returns no attention weights"):
        attention_to_patches(model, model.features([tiny_photograph()]), PROMPT, [5])


@pytest.mark.parametrize(
    ("pieces", "words", "of"),
    [
        (["A", " red", " d", "og", "."], ["A", "red", "dog."], [[0], [1], [2, 3, 4]]),
        ([" A", "\n", "\n", "dog"], ["A", "dog"], [[0, 1, 2], [3]]),
        (["\n", "A", " ", "dog", "\n"], ["A", "dog"], [[0, 1, 2], [3, 4]]),
        (["A ", "dog"], ["A", "dog"], [[0], [1]]),
        ([" ", "", "", "🙂", "!"], ["🙂!"], [[0, 1, 2, 3, 4]]),
        (["two words", " here"], ["two words", "here"], [[0], [1]]),
    ],
)
def test_tokens_join_to_words(pieces, words, of):
    weights = torch.rand(len(pieces), 4)
    got, rows = join_words(pieces, weights)
    assert got == words
    torch.testing.assert_close(rows, torch.stack([weights[index].mean(0) for index in of]))


@pytest.mark.parametrize("kind", ["baseline", "perceiver"])
def test_picture_is_written(loaded, run, out, photo, tmp_path, kind):
    tiny_projector(kind).save_pretrained(out / "projector")
    picture = tmp_path / "attention.PNG"
    status, _, stderr = run("--projector", out, "--image", photo, "--attention", picture)
    assert (status, stderr) == (0, "")
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 100


def test_words_and_weights_reach_the_figure(loaded, monkeypatch, out, photo, tmp_path):
    drawn = []
    monkeypatch.setattr(module, "answer_attention_figure", lambda *given: drawn.extend(given))
    monkeypatch.setattr(module, "save_figure", lambda figure, path: None)
    text = run_chat(ChatOptions(out, [photo], attention=tmp_path / "a.png", max_new_tokens=30))
    crop, words, weights, grid, kind, name = drawn
    assert name == photo.name
    assert (crop.size, grid, kind) == ((16, 16), (4, 4), "baseline")
    assert "".join(words) == "".join(text.split())
    torch.testing.assert_close(weights.sum(1), torch.ones(len(words)))


def test_empty_answer_has_no_picture(loaded, run, monkeypatch, out, photo, tmp_path):
    def say_nothing(model, *arguments, streamer, **options):
        streamer.put(torch.tensor([model.tokenizer.eos_token_id]))
        streamer.end()

    monkeypatch.setattr(module.VisualLanguageModel, "generate", say_nothing)
    picture = tmp_path / "a.png"
    status, _, stderr = run("--projector", out, "--image", photo, "--attention", picture)
    assert status == 1
    assert "the answer is empty" in stderr
    assert not picture.exists()


def test_help_names_every_option(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, stdout, _ = run("--help")
    assert status == 0
    options = "projector image prompt interactive encoder language-model attention backend"
    for option in (*options.split(), "max-new-tokens"):
        assert f"--{option}" in stdout
