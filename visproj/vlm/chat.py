"""``visproj chat``: questions about photographs to a trained projector and its two models."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from visproj.errors import InputError
from visproj.progress import SILENT, Progress
from visproj.vlm.conversation import Answer, Conversation, ConversationFullError, check_prompt
from visproj.vlm.encoders import VisionEncoder, cropped_notes
from visproj.vlm.figures import answer_attention_figure, save_figure
from visproj.vlm.model import VisualLanguageModel, check_backend
from visproj.vlm.photographs import Images, Photograph, load_photographs
from visproj.vlm.pretrained import PretrainedProjector, find_projector, load_pretrained
from visproj.vlm.trained import encoder_of, model_of

logger = logging.getLogger("visproj")

PROMPT = "you> "
HELP = """\
/image PATH  add an image to the next question; repeat for more
/clear       forget the conversation and its images
/help        list these commands
/quit        end the conversation, as the end of the input does
Any other line is a question; <image> marks the place of an image. Ctrl-C stops an answer."""


@dataclass(frozen=True)
class ChatOptions:
    """Options of ``visproj chat``.

    Attributes:
        projector: Directory of a trained projector, or the ``--out`` of its ``visproj train``.
        images: Image files of the question; in a conversation, of the first question.
        prompt: Question; ``None`` takes the prompt that the projector was trained with. In a
            conversation the first question; ``None`` reads it like the others.
        encoder: Directory or hub name of the encoder; ``None`` takes that of the training.
        language_model: Directory, hub name or GGUF file; ``None`` takes that of the training.
        attention: PNG file for a picture of the attention to the image; ``None`` draws none.
        max_new_tokens: Maximum length of an answer in tokens.
        interactive: Whether to hold a conversation even if there are images or a prompt.
    """

    projector: Path
    images: Sequence[Path] = ()
    prompt: str | None = None
    encoder: str | None = None
    language_model: str | None = None
    attention: Path | None = None
    max_new_tokens: int = 64
    interactive: bool = False

    @property
    def is_conversation(self) -> bool:
        """True if several questions are read one after the other, False for one question."""
        return self.interactive or (not self.images and self.prompt is None)


def run_chat(
    options: ChatOptions,
    *,
    write: Callable[[str], None] = lambda piece: None,
    progress: Progress = SILENT,
) -> str:
    """Answer one prompt, with or without photographs, by greedy decoding.

    Everything but the width of the language model is checked before that model is loaded.

    Args:
        options: Projector, images and prompt.
        write: Called with every piece of the answer as it is generated.
        progress: Receives each stage.

    Returns:
        The answer.

    Raises:
        FileNotFoundError: An image, a file of the checkpoint or the folder of the attention picture
            is missing.
        ValueError: A checkpoint, an image or a prompt cannot be used, the encoder is not the one of
            the checkpoint, or the projector's width is not the language model's.
        OSError: The attention picture cannot be written.
        ConnectionError, ModuleNotFoundError: A model or package is missing.
    """
    check_backend()
    if not options.images and options.prompt is None:
        raise InputError("there is neither an image nor a prompt: give at least one")
    _check_options(options)
    projector = load_pretrained(find_projector(options.projector))
    photographs = _photographs(options.images)
    images = Images(photographs)
    prompt = projector.prompt if options.prompt is None else options.prompt
    check_prompt(prompt, len(images))
    model = _load(options, projector, photographs, progress)

    progress.stage("reading the images")
    answer = Answer(model.tokenizer, write)
    model.generate(
        images,
        [prompt],
        [len(images)],
        streamer=answer,
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
        num_beams=1,
    )
    if options.attention is not None:
        _draw(model, photographs[0], prompt, answer, options.attention)
    return answer.text


def run_conversation(
    options: ChatOptions,
    *,
    read: Callable[[], str | None],
    write: Callable[[str], None] = lambda piece: None,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = SILENT,
) -> None:
    """Answer questions and run commands line by line, until the input ends or says ``/quit``.

    Args:
        options: Projector, models, and the images and prompt of the first question, if any.
        read: Returns the next line, or ``None`` at the end of the input.
        write: Called with every piece of an answer as it is generated, then with a newline.
        say: Called with every other message, such as why a question cannot be answered.
        progress: Receives each stage of loading.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed while a line was read. During an answer, Ctrl-C only
            stops the answer.
        FileNotFoundError, ValueError, ConnectionError, ModuleNotFoundError: As :func:`run_chat`,
            before the first question.
    """
    check_backend()
    if options.attention is not None:
        raise InputError("attention is not drawn in a conversation: leave out --attention")
    _check_options(options)
    projector = load_pretrained(find_projector(options.projector))
    photographs = _photographs(options.images)
    if options.prompt is not None:
        check_prompt(options.prompt, len(photographs))
    model = _load(options, projector, photographs, progress)
    lines = _Lines(model, write, say, options.max_new_tokens)
    lines.images = [photograph.image for photograph in photographs]
    if _is_terminal():
        say("/help lists the commands, /quit ends")
    if options.prompt is not None:
        progress.stage("reading the images")
        lines.ask(options.prompt)
    while (line := read()) is not None and lines.take(line.strip()):
        pass


class _Lines:
    """Interpreter of the lines of a conversation: questions, and commands that begin with a slash.

    Attributes:
        images: Images for the next question.
    """

    def __init__(
        self,
        model: VisualLanguageModel,
        write: Callable[[str], None],
        say: Callable[[str], None],
        max_new_tokens: int,
    ) -> None:
        self.images: list[Image.Image] = []
        self._conversation = Conversation(model)
        self._write = write
        self._say = say
        self._max_new_tokens = max_new_tokens

    def take(self, line: str) -> bool:
        """Process a line and return whether the conversation continues."""
        command, *rest = line.split(maxsplit=1) or [""]
        if command == "/quit":
            return False
        if command == "/image":
            self.attach(*rest)
        elif command == "/clear":
            self._conversation.clear()
            self.images = []
            self._say("the conversation and its images are forgotten")
        elif command == "/help":
            self._say(HELP)
        elif command.startswith("/"):
            self._say(f"unknown command {command}: /help lists the commands")
        elif line:
            self.ask(line)
        return True

    def attach(self, name: str = "") -> None:
        """Keep an image for the next question, or say why it cannot be read."""
        if not name:
            self._say("/image needs a file: /image PATH")
            return
        path = Path(os.path.expanduser(name.strip("'\"")))  # a dragged file comes in quotes
        try:
            (photograph,) = load_photographs([path])
            image = photograph.image
        except (InputError, OSError) as error:
            self._say(" ".join(str(error).split()))
            return
        _note_crops(self._conversation.model.encoder, [photograph])
        self.images.append(image)
        self._say(f"{path.name} is added to the next question")

    def ask(self, question: str) -> None:
        """Answer a question. If it gets no answer, its images stay for the next question."""
        longest = self._max_new_tokens
        try:
            self._conversation.ask(question, self.images, max_new_tokens=longest, write=self._write)
        except KeyboardInterrupt:
            self._write("\n")
            self._say("stopped: the question and its partial answer are forgotten")
        except ConversationFullError as error:
            self._say(f"{error}; /clear begins a new conversation")
        except InputError as error:
            self._say(" ".join(str(error).split()))
        else:
            self._write("\n")
            self.images = []


def read_line() -> str | None:
    """Return the next line of stdin, or ``None`` at its end; print a prompt on a terminal."""
    if sys.stdin is None:  # closed
        return None
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors != "replace":
        sys.stdin.reconfigure(errors="replace")
    is_terminal = _is_terminal()
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  # enables line editing and history
    try:
        return input(PROMPT if is_terminal else "")
    except (EOFError, KeyboardInterrupt) as end:
        if is_terminal:
            print()
        if isinstance(end, KeyboardInterrupt):
            raise
        return None


def _is_terminal() -> bool:
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def _check_options(options: ChatOptions) -> None:
    if options.max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {options.max_new_tokens}")
    if options.attention is not None:
        _check_picture(options.attention, len(options.images))


def _photographs(paths: Sequence[Path]) -> list[Photograph]:
    return load_photographs(paths) if paths else []  # without paths it loads examples


def _note_crops(encoder: VisionEncoder, photographs: Sequence[Photograph]) -> None:
    for note in cropped_notes(encoder, photographs):
        logger.warning(note)


def _load(
    options: ChatOptions,
    projector: PretrainedProjector,
    photographs: Sequence[Photograph],
    progress: Progress,
) -> VisualLanguageModel:
    """Load the encoder, check that it is the projector's, then load the language model."""
    progress.stage("loading the vision encoder")
    encoder = encoder_of(projector, options.encoder)
    _note_crops(encoder, photographs)
    progress.stage("loading the language model")
    return model_of(projector, encoder, options.language_model)


def _check_picture(path: Path, images: int) -> None:
    if images != 1:
        raise InputError(f"attention is drawn over exactly one image, got {images}")
    if path.suffix.lower() != ".png":
        raise InputError(f"the attention picture must be a .png file, got {path.name}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such folder for the attention picture: {path.parent}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"the attention picture cannot be written: {path}")


@torch.inference_mode()
def attention_to_patches(
    model: VisualLanguageModel, features: Tensor, prompt: str, ids: Sequence[int]
) -> Tensor:
    """Compute the language model's attention to the image's patches for each token of an answer.

    At the position that predicts a token, the language model's attention to the visual tokens is
    averaged over layers and heads: ``[T, K]``. With a Perceiver it is multiplied by the Perceiver's
    own attention, averaged over heads: ``[T, K] @ [K, S] -> [T, S]``. The other projectors have one
    visual token per patch. A CLS token is dropped, and each row is divided by its sum.

    Args:
        model: Model whose projector is a :class:`~visproj.vlm.pretrained.PretrainedProjector`.
        features: Features of one image, ``[1, 1 + S, C]``, or ``[1, S, C]`` without a CLS token.
        prompt: Prompt that was answered.
        ids: ``T`` token ids of the answer.

    Returns:
        fp32 ``[T, S]`` on the CPU, every row adding up to 1.

    Raises:
        ValueError: The language model returns no attention weights.
    """
    sequence = model.compose(features, [prompt])
    begin = model.prompt_ids(prompt).index(model.image_token_id)
    count = sequence.inputs_embeds.shape[1] - len(model.prompt_ids(prompt)) + 1
    seen = _attention(model.language_model, sequence.inputs_embeds, ids)[:, begin : begin + count]
    projector = cast(PretrainedProjector, model.projector)
    has_cls = model.encoder.has_cls
    if projector.kind == "perceiver":
        dtype = next(projector.parameters()).dtype
        _, maps = projector(features.to(model.device, dtype), return_attention=True)
        seen = seen @ maps[0].float().mean(0)  # [T, Q] @ [Q, S]
        has_cls = has_cls and not projector.module.has_cls  # the Perceiver dropped it
    if has_cls:
        seen = seen[:, 1:]
    return (seen / seen.sum(1, keepdim=True)).cpu()


def _attention(language_model: Any, prefix: Tensor, ids: Sequence[int]) -> Tensor:
    """Return the mean attention ``[T, P + T - 1]`` of the positions that predict ``ids``."""
    tokens = torch.tensor([ids[:-1]], dtype=torch.long, device=prefix.device)
    written = language_model.get_input_embeddings()(tokens)
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")  # the others return no weights
    try:
        out = language_model(
            inputs_embeds=torch.cat([prefix, written], 1),
            output_attentions=True,
            use_cache=False,
            logits_to_keep=1,
        )
    finally:
        language_model.set_attn_implementation(before)
    layers = [weights[0, :, -len(ids) :] for weights in out.attentions or () if weights is not None]
    if not layers:
        raise InputError("the language model returns no attention weights: leave out --attention")
    return torch.stack([weights.float().mean(0) for weights in layers]).mean(0)


def join_words(pieces: Sequence[str], weights: Tensor) -> tuple[list[str], Tensor]:
    """Join tokens to words at white space, and average the rows of ``weights`` over each word.

    A token of white space alone belongs to the word before it, or to the first word.

    Args:
        pieces: Text that each of the ``T`` tokens adds.
        weights: Attention of each token, ``[T, S]``.

    Returns:
        ``W`` words and their weights ``[W, S]``. No word is blank unless the whole text is.
    """
    words: list[str] = []
    rows: list[list[Tensor]] = []
    for piece, row in zip(pieces, weights, strict=True):
        starts = piece[:1].isspace() or (words and words[-1][-1:].isspace())
        if not words or (starts and words[-1].strip() and piece.strip()):
            words.append("")
            rows.append([])
        words[-1] += piece
        rows[-1].append(row)
    return [word.strip() for word in words], torch.stack([torch.stack(row).mean(0) for row in rows])


def _draw(
    model: VisualLanguageModel, photograph: Photograph, prompt: str, answer: Answer, path: Path
) -> None:
    special = set(model.tokenizer.all_special_ids)
    shown = [index for index, token in enumerate(answer.ids) if token not in special]
    if not shown:
        raise InputError("the answer is empty: there is no attention to draw")
    image = photograph.image
    weights = attention_to_patches(model, model.features([image]), prompt, answer.ids)
    words, weights = join_words([answer.pieces[index] for index in shown], weights[shown])
    eye = model.encoder
    kind = cast(PretrainedProjector, model.projector).kind
    figure = answer_attention_figure(
        eye.crop(image), words, weights, eye.grid, kind, photograph.path.name
    )
    save_figure(figure, path)
