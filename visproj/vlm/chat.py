"""``visproj chat``: a trained projector between its two models, asked about photographs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from visproj.errors import InputError
from visproj.progress import SILENT, Progress
from visproj.vlm.encoders import OfflineEncoder, VisionEncoder, cropped_notes, load_encoder
from visproj.vlm.figures import answer_attention_figure, save_figure
from visproj.vlm.language import IMAGE_TOKEN, NAME, load_language_model
from visproj.vlm.model import VisualLanguageModel, check_backend, default_device
from visproj.vlm.photographs import Images, Photograph, load_photographs
from visproj.vlm.pretrained import PretrainedProjector, find_projector, load_pretrained

logger = logging.getLogger("visproj")


@dataclass(frozen=True)
class ChatOptions:
    """What ``visproj chat`` is asked for; the command line says the same of each.

    Attributes:
        projector: The checkpoint's directory, or the ``--out`` of ``visproj train`` around it.
        images: Image files, all of them for one answer.
        prompt: What is asked; ``None`` is what the projector was trained with.
        encoder: CLIP or DINOv2 model; ``None`` is the one the projector was trained with.
        language_model: Name on the hub, directory or GGUF file; ``None`` as for ``encoder``.
        attention: PNG of where the model looked; ``None`` draws none.
        max_new_tokens: The longest answer.
    """

    projector: Path
    images: Sequence[Path]
    prompt: str | None = None
    encoder: str | None = None
    language_model: str | None = None
    attention: Path | None = None
    max_new_tokens: int = 64


class Answer(BaseStreamer):
    """What ``generate`` writes, handed on token by token, characters whole.

    Args:
        tokenizer: Turns ids into text.
        write: Called with each new piece of text.

    Attributes:
        ids: The tokens so far.
        pieces: What each of them added to the text; empty for a special token and for a part of a
            character.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None] = lambda piece: None) -> None:
        self.ids: list[int] = []
        self.pieces: list[str] = []
        self._tokenizer = tokenizer
        self._write = write

    @property
    def text(self) -> str:
        """All pieces together."""
        return "".join(self.pieces)

    def put(self, value: Tensor) -> None:
        """Take new tokens; the first call's are the prompt's, none where embeddings came in."""
        for token in value.flatten().tolist():
            self.ids.append(token)
            # Bytes of an unfinished character decode to U+FFFD, until the rest of them is in.
            self.pieces.append(self._new().rstrip("\ufffd"))
            self._write(self.pieces[-1])

    def end(self) -> None:
        """Hand on what is left of a character that was never finished."""
        if self.ids:
            rest = self._new()
            self.pieces[-1] += rest
            self._write(rest)

    def _new(self) -> str:
        """What the tokens so far add to the text so far."""
        text = self._tokenizer.decode(
            self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text[len(self.text) :]


def run_chat(
    options: ChatOptions,
    *,
    write: Callable[[str], None] = lambda piece: None,
    progress: Progress = SILENT,
) -> str:
    """Answer a prompt about photographs, greedily.

    Whatever can be refused is refused before the language model is loaded, but for its width.

    Args:
        options: Checkpoint, images and prompt.
        write: Called with every piece of the answer as it is written.
        progress: Receives each stage.

    Returns:
        The answer.

    Raises:
        FileNotFoundError: An image, a file of the checkpoint or the picture's folder is missing.
        ValueError: A checkpoint, an image or a prompt that cannot be used, another encoder than
            the checkpoint's, or widths that differ.
        OSError: The picture cannot be written.
        ConnectionError, ModuleNotFoundError: A model or package is missing.
    """
    check_backend()
    if not options.images:
        raise InputError("there is no image to chat about")
    if options.max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {options.max_new_tokens}")
    if options.attention is not None:
        _check_picture(options.attention, len(options.images))
    projector = load_pretrained(find_projector(options.projector))
    photographs = load_photographs(options.images)
    images = Images(photographs)
    prompt = projector.prompt if options.prompt is None else options.prompt
    _check_prompt(prompt, len(images))
    progress.stage("loading the vision encoder")
    encoder = load_encoder(_named(options.encoder, projector.encoder, OfflineEncoder.name))
    projector.check_encoder(encoder)
    for note in cropped_notes(encoder, photographs):
        logger.warning(note)
    progress.stage("loading the language model")
    name = _named(options.language_model, projector.language_model, NAME)
    model = _assemble(encoder, projector, name)

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


def _check_picture(path: Path, images: int) -> None:
    if images > 1:
        raise InputError(f"the attention is drawn over one image, not over {images}")
    if path.suffix.lower() != ".png":
        raise InputError(f"the picture of the attention is a PNG, call it .png, not {path.name}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such folder for the picture of the attention: {path.parent}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"the picture of the attention cannot be written: {path}")


def _check_prompt(prompt: str, images: int) -> None:
    found = prompt.count(IMAGE_TOKEN)
    if found not in (0, images):
        raise InputError(
            f"{IMAGE_TOKEN} is in the prompt {found} times, the number of images is {images}"
        )


def _named(given: str | None, trained_with: str, offline: str) -> str | None:
    """What to load: the user's choice, else the checkpoint's, ``None`` for the offline model."""
    name = trained_with if given is None else given
    return None if name == offline else name


def _assemble(
    encoder: VisionEncoder, projector: PretrainedProjector, language_model: str | None
) -> VisualLanguageModel:
    _, language, tokenizer = load_language_model(language_model)
    device = default_device()
    return VisualLanguageModel(encoder, projector.to(device), language.to(device), tokenizer).eval()


@torch.inference_mode()
def attention_to_patches(
    model: VisualLanguageModel, features: Tensor, prompt: str, ids: Sequence[int]
) -> Tensor:
    """Where in an image the language model looked as it wrote each token of an answer.

    The language model's attention to the visual tokens is taken at the position that each token was
    predicted from, averaged over layers and heads and normalised. A Perceiver's own attention, the
    mean over its heads, carries it on to the patches; the other projectors have a token a patch,
    and their CLS token is left out.

    Args:
        model: Whose projector is a :class:`~visproj.vlm.pretrained.PretrainedProjector`.
        features: ``[1, 1 + S, C]``, of one image.
        prompt: What was asked.
        ids: ``T`` tokens of the answer.

    Returns:
        fp32 ``[T, S]`` on the CPU, every row adding up to 1.

    Raises:
        ValueError: The language model gives no attention weights.
    """
    sequence = model.compose(features, [prompt])
    begin = model.prompt_ids(prompt).index(model.image_token_id)
    count = sequence.inputs_embeds.shape[1] - len(model.prompt_ids(prompt)) + 1
    seen = _attention(model.language_model, sequence.inputs_embeds, ids)[:, begin : begin + count]
    if model.projector.kind == "perceiver":
        dtype = next(model.projector.parameters()).dtype
        _, maps = model.projector(features.to(model.device, dtype), return_attention=True)
        seen = seen @ maps[0].float().mean(0)  # [T, Q] @ [Q, S]
    else:
        seen = seen[:, 1:]
    return (seen / seen.sum(1, keepdim=True)).cpu()


def _attention(language_model: Any, prefix: Tensor, ids: Sequence[int]) -> Tensor:
    """Mean attention ``[T, P + T - 1]`` of the positions that predict ``ids`` after a prefix."""
    tokens = torch.tensor([ids[:-1]], dtype=torch.long, device=prefix.device)
    written = language_model.get_input_embeddings()(tokens)
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")  # the others keep no weights
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
        raise InputError("the language model gives no attention weights")
    return torch.stack([weights.float().mean(0) for weights in layers]).mean(0)


def join_words(pieces: Sequence[str], weights: Tensor) -> tuple[list[str], Tensor]:
    """Tokens joined to words at white space, the rows of ``weights`` averaged over each word.

    A token of white space alone belongs to the word before it, or to the first word.

    Args:
        pieces: What each of the ``T`` tokens adds to the text.
        weights: ``[T, S]``.

    Returns:
        ``W`` words and ``[W, S]``. Words are never blank, unless the whole text is.
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
