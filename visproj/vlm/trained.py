"""A trained projector put between the two models that it was trained with."""

from __future__ import annotations

from visproj.vlm.encoders import OfflineEncoder, VisionEncoder, load_encoder
from visproj.vlm.language import NAME, load_language_model
from visproj.vlm.model import VisualLanguageModel, default_device
from visproj.vlm.pretrained import PretrainedProjector


def encoder_of(projector: PretrainedProjector, given: str | None = None) -> VisionEncoder:
    """Load the vision encoder that a projector was trained with.

    Args:
        projector: Knows its name or path.
        given: Where it is now; ``None`` is where it was in training.

    Raises:
        InputError: It is another encoder, or its directory cannot be used.
        ConnectionError, ModuleNotFoundError: The encoder or a package is missing.
    """
    encoder = load_encoder(_named(given, projector.encoder, OfflineEncoder.name))
    projector.check_encoder(encoder)
    return encoder


def model_of(
    projector: PretrainedProjector, encoder: VisionEncoder, given: str | None = None
) -> VisualLanguageModel:
    """Load the language model and put all three together, on the GPU if there is one.

    Args:
        projector: Knows the language model's name or path.
        encoder: From :func:`encoder_of`.
        given: Where the language model is now; ``None`` is where it was in training.

    Raises:
        InputError: Its width is not the projector's, or it cannot be used.
        ConnectionError, ModuleNotFoundError: The model or a package is missing.
    """
    _, language, tokenizer = load_language_model(_named(given, projector.language_model, NAME))
    device = default_device()
    return VisualLanguageModel(
        encoder.to(device), projector.to(device), language.to(device), tokenizer
    ).eval()


def _named(given: str | None, trained_with: str, offline: str) -> str | None:
    """What to load: the user's choice, else the checkpoint's, ``None`` for the offline model."""
    name = trained_with if given is None else given
    return None if name == offline else name
