"""Conversations against whole sequences computed without a cache, and the command's lines."""

import inspect
import io
import sys

import pytest
import torch
from vlm.test_decoding import KINDS, assemble, build
from vlm.tiny import (
    TEMPLATE,
    TinyEncoder,
    tiny_language_model,
    tiny_model,
    tiny_photograph,
    tiny_projector,
    tiny_tokenizer,
)

from visproj import cli
from visproj.errors import InputError
from visproj.vlm import chat, conversation, trained
from visproj.vlm.conversation import Conversation, ConversationFullError
from visproj.vlm.prompts import end_of_text_ids

# Questions, and how many images each has.
TURNS = [
    ("What is this?", 2),
    ("a red dog", 0),
    ("left <image> right <image> red", 2),
    ("", 0),
    ("and this", 1),
]
PLACED = ["<image>\n<image>\nWhat is this?", *(text for text, _ in TURNS[1:4]), "<image>\nand this"]
LONGEST = 9


def photographs(turns=TURNS):
    """New images for each turn."""
    seeds = iter(range(100))
    return [[tiny_photograph(next(seeds)) for _ in range(count)] for _, count in turns]


@pytest.fixture
def answers(monkeypatch):
    """The ``Answer`` of every turn, which has the tokens as they were generated."""
    made = []

    class Kept(conversation.Answer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(conversation, "Answer", Kept)
    return made


@pytest.fixture
def read(monkeypatch):
    """How many tokens each forward of a model's language model reads."""

    def watch(model):
        counts = []
        forward = model.language_model.forward

        def counting(*arguments, **options):
            tokens = options.get("inputs_embeds")
            counts.append((options["input_ids"] if tokens is None else tokens).shape[1])
            return forward(*arguments, **options)

        counting.__signature__ = inspect.signature(forward)
        monkeypatch.setattr(model.language_model, "forward", counting)
        return counts

    return watch


def ask_all(model, turns=TURNS, longest=LONGEST):
    talk = Conversation(model)
    pairs = zip(turns, photographs(turns), strict=True)
    return talk, [talk.ask(text, images, max_new_tokens=longest) for (text, _), images in pairs]


@torch.no_grad()
def from_scratch(model, questions, images, written, longest=LONGEST):
    """Ids of the next answer by plain forwards; ``written`` has those of each earlier answer."""
    texts = [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    befores = model._prompts.question_ids(questions, [text.strip() or "." for text in texts], 0)
    ends = {model.tokenizer.eos_token_id, *end_of_text_ids(model.language_model)}
    row = []
    for before, answer in zip(befores, written, strict=False):
        row += before + (answer[:-1] if answer[-1] in ends else answer)
        row.append(model.tokenizer.eos_token_id)
    row = torch.tensor([row + befores[-1]])
    features = model.features(images)
    embeds = model.place(features, row, torch.ones_like(row), [len(images)]).inputs_embeds
    new = []
    while len(new) < longest and not ends & {*new}:
        after = torch.tensor([new], dtype=torch.long)
        whole = torch.cat([embeds, model.language_model.get_input_embeddings()(after)], 1)
        logits = model.language_model(inputs_embeds=whole, use_cache=False).logits
        new.append(int(logits[0, -1].argmax()))
    return new


def assert_as_from_scratch(model, answers, turns=TURNS, placed=PLACED):
    images = photographs(turns)
    written = [answer.ids for answer in answers]
    assert len(written) == len(turns)
    for turn in range(len(turns)):
        before = [image for row in images[: turn + 1] for image in row]
        got = from_scratch(model, placed[: turn + 1], before, written[:turn])
        assert got == written[turn], f"turn {turn}"


@pytest.mark.parametrize("shares", [True, False], ids=["cached", "whole"])
@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["template", "plain"])
@pytest.mark.parametrize("kind", ["baseline", "perceiver"])
def test_answers_are_those_from_scratch(answers, kind, template, shares):
    model = tiny_model(kind, template).eval()
    assert model._shares_cache
    model._shares_cache = shares
    turns, placed = (TURNS, PLACED) if kind == "baseline" else (TURNS[:2], PLACED[:2])
    _, texts = ask_all(model, turns)
    assert_as_from_scratch(model, answers, turns, placed)
    assert texts == [answer.text for answer in answers]
    if kind == "baseline":
        assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_language_model(answers, name):
    shares, *described = KINDS[name]
    model = assemble(build(*described)).eval()
    assert model._shares_cache is shares
    turns = [("this", 1), ("a red dog", 0), ("<image>?", 1)]
    talk, _ = ask_all(model, turns)
    assert (talk._history.cache is not None) is shares
    placed = ["<image>\nthis", "a red dog", "<image>?"]
    assert_as_from_scratch(model, answers, turns, placed)


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["template", "plain"])
def test_tokens_are_those_of_training(answers, template):
    """The embeddings of the history are those of the dialogue's tokens."""
    model = tiny_model(template=template).eval()
    talk, _ = ask_all(model)
    written = [answer.ids for answer in answers]
    images = [image for row in photographs() for image in row]
    befores = model._prompts.question_ids(
        PLACED, [answer.text.strip() for answer in answers], len(images)
    )
    end = model.tokenizer.eos_token_id
    assert not any(end in ids for ids in written)
    pairs = zip(befores, written, strict=True)
    row = torch.tensor([[token for pair in pairs for token in (*pair[0], *pair[1], end)]])
    assert row[0].tolist().count(end) == len(TURNS) * (2 if template else 1)
    features = model.features(images)
    want = model.place(features, row, torch.ones_like(row), [len(images)]).inputs_embeds
    torch.testing.assert_close(talk._history.embeds, want)
    assert talk.tokens == want.shape[1]


def ending(model, how):
    """A model whose first answer ends after a few tokens, by ``how``."""
    answer = conversation.Answer(model.tokenizer)
    options = {"max_new_tokens": 5, "do_sample": False, "streamer": answer}
    model.generate(photographs()[0], [TURNS[0][0]], [2], **options)
    ids = answer.ids
    if how == "its own end":
        model.language_model.generation_config.eos_token_id = [ids[4]]
    else:
        head, end = model.language_model.lm_head.weight.data, model.tokenizer.eos_token_id
        head[[end, ids[4]]] = head[[ids[4], end]]
    return ids.index(ids[4])


@pytest.mark.parametrize("shares", [True, False], ids=["cached", "whole"])
@pytest.mark.parametrize("how", ["the tokenizer's end", "its own end"])
def test_end_of_text_is_there_once(answers, how, shares):
    model = tiny_model().eval()
    model._shares_cache = shares
    length = ending(model, how)
    answers.clear()
    talk, _ = ask_all(model)
    ids = answers[0].ids
    assert len(ids) == length + 1
    assert ids[-1] in talk._ends()
    assert (ids[-1] == model.tokenizer.eos_token_id) is (how != "its own end")
    assert_as_from_scratch(model, answers)
    before = len(model.prompt_ids(TURNS[0][0], 2)) + 2 * (model.tokens_per_image - 1)
    table = model.language_model.get_input_embeddings().weight
    end = talk._history.embeds[0, before + length]
    torch.testing.assert_close(end, table[model.tokenizer.eos_token_id])


def test_first_answer_is_the_one_shot_answer():
    (text, _), images = TURNS[0], photographs()[0]
    want = tiny_model().generate(images, [text], [2], max_new_tokens=20, do_sample=False)
    pieces = []
    got = Conversation(tiny_model()).ask(text, images, max_new_tokens=20, write=pieces.append)
    assert [got] == want == ["".join(pieces)]


def test_further_turns_read_new_tokens_alone(answers, read):
    model = tiny_model().eval()
    counts = read(model)
    talk = Conversation(model)
    before = 0
    for (text, _), images in zip(TURNS, photographs(), strict=True):
        counts.clear()
        talk.ask(text, images, max_new_tokens=LONGEST)
        new = talk.tokens - before - LONGEST - 1  # question and images
        unread = 2 if before else 0  # the last answer was cut: its last token, and its end of text
        assert counts == [new + unread] + [1] * (LONGEST - 1)
        assert talk._history.cache.get_seq_length() == talk.tokens - 2
        before = talk.tokens


def test_without_a_cache_everything_is_read_again(read):
    model = tiny_model().eval()
    model._shares_cache = False
    counts = read(model)
    talk = Conversation(model)
    talk.ask("a cat", photographs()[0], max_new_tokens=2)
    before = talk.tokens
    counts.clear()
    talk.ask("red", max_new_tokens=2)
    assert counts[0] == talk.tokens - 3 > before


class Stop:
    """Raises at the third piece of an answer."""

    def __init__(self, error):
        self.error = error
        self.pieces = []

    def __call__(self, piece):
        self.pieces.append(piece)
        if len(self.pieces) == 3:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")], ids=repr)
@pytest.mark.parametrize("turn", [0, 2])
def test_an_unfinished_turn_is_forgotten(error, turn):
    model = tiny_model().eval()
    images = photographs()
    want, got = Conversation(model), Conversation(model)
    for number, (text, _) in enumerate(TURNS[: turn + 1]):
        if number == turn:
            kept = got.tokens
            with pytest.raises(type(error)):
                got.ask("another <image>", images[0][:1], write=Stop(error))
            assert got.tokens == kept
            assert got._history.cache.get_seq_length() == max(0, kept - 2)
        answer = want.ask(text, images[number], max_new_tokens=LONGEST)
        assert got.ask(text, images[number], max_new_tokens=LONGEST) == answer
    torch.testing.assert_close(got._history.embeds, want._history.embeds, rtol=0, atol=0)
    for one, other in zip(got._history.cache.layers, want._history.cache.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, rtol=0, atol=0)


def test_a_window_that_was_exceeded_is_restored():
    """The cache of a sliding window cannot be cropped."""
    _, *described = KINDS["Mistral, windows"]
    model = assemble(build(*described)).eval()
    want, got = Conversation(model), Conversation(model)
    for talk in (want, got):
        talk.ask("this", photographs()[0], max_new_tokens=LONGEST)
    with pytest.raises(KeyboardInterrupt):
        got.ask("a long question about it", write=Stop(KeyboardInterrupt()))
    assert got.ask("red", max_new_tokens=LONGEST) == want.ask("red", max_new_tokens=LONGEST)


def test_clear():
    model = tiny_model().eval()
    talk, texts = ask_all(model)
    talk.clear()
    assert talk.tokens == 0
    assert talk.ask(TURNS[0][0], photographs()[0], max_new_tokens=LONGEST) == texts[0]


def test_full():
    model = tiny_model().eval()
    model.language_model.config.max_position_embeddings = 60
    talk = Conversation(model)
    with pytest.raises(InputError, match=r"do not fit into .* context of 60 tokens") as raised:
        talk.ask("this", photographs()[0][:1], max_new_tokens=60)
    assert not isinstance(raised.value, ConversationFullError)
    answer = talk.ask("this", photographs()[0][:1], max_new_tokens=LONGEST)
    kept, seen = talk.tokens, len(model.encoder.batches)
    with pytest.raises(ConversationFullError, match=r"is full: .* context of 60 tokens"):
        talk.ask("this", photographs()[0][:1], max_new_tokens=LONGEST)
    assert talk.tokens == kept
    assert len(model.encoder.batches) == seen  # refused before an image is encoded
    talk.clear()
    assert talk.ask("this", photographs()[0][:1], max_new_tokens=LONGEST) == answer


def test_what_cannot_be_asked():
    talk = Conversation(tiny_model(template=None).eval())
    image = tiny_photograph()
    for arguments, message in [
        (("<image> <image>", [image]), "the prompt has 2 of <image> for 1 images: write one"),
        (("<image>",), "the prompt has 1 of <image> for 0 images: write one per image"),
        (("a", image), "images must be a list of images"),
    ]:
        with pytest.raises(InputError, match=message):
            talk.ask(*arguments)
    with pytest.raises(InputError, match="max_new_tokens must be at least 1, got 0"):
        talk.ask("a", max_new_tokens=0)
    assert talk.tokens == 0


def test_template_for_one_turn_alone():
    talk = Conversation(tiny_model(template="{{ messages[-1]['content'] }}:").eval())
    talk.ask("a", max_new_tokens=2)
    kept = talk.tokens
    with pytest.raises(InputError, match="cannot be used for several turns"):
        talk.ask("b", max_new_tokens=2)
    assert talk.tokens == kept


# The command.


@pytest.fixture
def loaded(monkeypatch):
    """Tiny models in place of all others."""
    models = "tiny-llama", tiny_language_model(), tiny_tokenizer()
    monkeypatch.setattr(trained, "load_encoder", lambda name: TinyEncoder())
    monkeypatch.setattr(trained, "load_language_model", lambda name: models)
    return models[1]


@pytest.fixture
def run(loaded, monkeypatch, capsys, tmp_path):
    """``visproj chat`` in this process with these lines: exit status, stdout, stderr."""
    tiny_projector().save_pretrained(tmp_path / "projector")
    for seed in range(2):
        tiny_photograph(seed).save(tmp_path / f"photo {seed}.png")
    monkeypatch.chdir(tmp_path)

    def call(lines, *arguments, kind=io.StringIO):
        monkeypatch.setattr(sys, "stdin", kind("".join(f"{line}\n" for line in lines)))
        given = ["--projector", "projector", "--max-new-tokens", str(LONGEST), *arguments]
        monkeypatch.setattr(sys, "argv", ["visproj", "chat", *given])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        captured = capsys.readouterr()
        return exit_info.value.code, captured.out, captured.err

    return call


def talked(*turns):
    """What is written of turns, a text and seeds of photographs each."""
    talk = Conversation(tiny_model())
    return "".join(
        talk.ask(text, [tiny_photograph(seed) for seed in seeds], max_new_tokens=LONGEST) + "\n"
        for text, *seeds in turns
    )


def test_lines_of_a_conversation(run):
    lines = ["/image photo 0.png", "  /image  'photo 1.png'", "a <image> b <image>", "", "red?"]
    status, stdout, stderr = run(lines)
    assert status == 0
    assert stdout == talked(("a <image> b <image>", 0, 1), ("red?",))
    assert stderr == (
        "photo 0.png is added to the next question\nphoto 1.png is added to the next question\n"
    )


def test_images_and_prompt_of_the_command_line_come_first(run):
    image = ("--image", "photo 1.png")
    assert run(["a", "b"], *image, "--interactive") == (0, talked(("a", 1), ("b",)), "")
    status, stdout, _ = run(["b"], *image, "--interactive", "--prompt", "a <image>")
    assert (status, stdout) == (0, talked(("a <image>", 1), ("b",)))
    assert run(["b"], "--interactive", "--prompt", "a")[1] == talked(("a",), ("b",))


def test_a_prompt_without_an_image_is_one_question(run):
    assert run(["b"], "--prompt", "a") == (0, talked(("a",)), "")
    status, _, stderr = run([], "--prompt", "a <image>")
    assert (status, stderr.count("\n")) == (1, 1)
    assert "the prompt has 1 of <image> for 0 images: " in stderr


@pytest.mark.parametrize("lines", [[], ["/quit", "a"], ["", "  "]], ids=str)
def test_nothing_is_asked(run, lines):
    assert run(lines) == (0, "", "")


def test_closed_input(run):
    assert run([], kind=lambda text: None) == (0, "", "")


def test_other_commands(run):
    lines = ["/help", "/images a", "/image", "/ a", "a", "/image photo 0.png", "/clear", "a"]
    status, stdout, stderr = run(lines)
    assert (status, stdout) == (0, talked(("a",)) * 2)
    assert stderr.splitlines()[: len(chat.HELP.splitlines())] == chat.HELP.splitlines()
    assert stderr.splitlines()[len(chat.HELP.splitlines()) :] == [
        "unknown command /images: /help lists the commands",
        "/image needs a file: /image PATH",
        "unknown command /: /help lists the commands",
        "photo 0.png is added to the next question",
        "the conversation and its images are forgotten",
    ]


def test_image_that_cannot_be_read(run, tmp_path):
    (tmp_path / "text.png").write_text("text")
    lines = ["/image none.png", "/image text.png", "/image .", "/image ~no one/a", "a"]
    status, stdout, stderr = run(lines)
    assert (status, stdout) == (0, talked(("a",)))
    missing, damaged, folder, user = stderr.splitlines()
    assert missing == "no such image: none.png"
    assert damaged.startswith("cannot read text.png as an image")
    assert folder.startswith("cannot read . as an image")
    assert user == "no such image: ~no one/a"


def test_images_stay_where_a_question_fails(run):
    lines = ["/image photo 0.png", "<image> <image>", "a"]
    status, stdout, stderr = run(lines)
    assert (status, stdout) == (0, talked(("a", 0)))
    assert "the prompt has 2 of <image> for 1 images: " in stderr


def test_full_conversation_goes_on_when_it_is_cleared(run, loaded):
    loaded.config.max_position_embeddings = 40
    question = "a question of many tokens"
    status, stdout, stderr = run([question, question, "/clear", question, "a" * 60])
    assert (status, stdout) == (0, talked((question,)) * 2)
    full, cleared, too_long = stderr.splitlines()
    assert full.startswith("the conversation is full: ")
    assert full.endswith("; /clear begins a new conversation")
    assert "forgotten" in cleared
    assert "full" in too_long


def test_interrupt_ends_an_answer(run, monkeypatch):
    ask, stop = Conversation.ask, Stop(KeyboardInterrupt())

    def stopped(self, question, *arguments, write=str, **options):
        def both(piece):
            write(piece)
            _ = question == "stop" and stop(piece)

        return ask(self, question, *arguments, write=both, **options)

    monkeypatch.setattr(Conversation, "ask", stopped)
    status, stdout, stderr = run(["a", "/image photo 0.png", "stop", "b"])
    begun = "".join(stop.pieces)
    first, both = talked(("a",)), talked(("a",), ("b", 0))
    assert (status, stdout) == (0, f"{first}{begun}\n{both[len(first) :]}")
    assert stderr.endswith("stopped: the question and its partial answer are forgotten\n")


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Interrupted(Terminal):
    """Ctrl-C in place of the end."""

    def readline(self, *arguments):
        line = super().readline(*arguments)
        if not line:
            raise KeyboardInterrupt
        return line


@pytest.mark.parametrize("kind", [Terminal, Interrupted])
def test_terminal(run, monkeypatch, kind):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    status, stdout, stderr = run(["a"], kind=kind)
    stopped = kind is Interrupted
    assert (status, stdout) == (130 if stopped else 0, f"you> {talked(('a',))}you> \n")
    assert stderr == "/help lists the commands, /quit ends\n" + "stopped\n" * stopped


def test_attention_of_a_conversation_is_refused(run, monkeypatch):
    monkeypatch.setattr(trained, "load_encoder", lambda name: pytest.fail("loaded"))
    status, stdout, stderr = run([], "--attention", "a.png")
    assert (status, stdout) == (1, "")
    assert stderr == "error: attention is not drawn in a conversation: leave out --attention\n"
    status, _, stderr = run([], "--attention", "a.png", "--prompt", "a")
    assert stderr == "error: attention is drawn over exactly one image, got 0\n"
