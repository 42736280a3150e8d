"""Loading the two models that a projector was trained with, and combining the three."""

from __future__ import annotations

from visproj.vlm.encoders import OfflineEncoder, VisionEncoder, load_encoder
from visproj.vlm.language import NAME, load_language_model
from visproj.vlm.model import VisualLanguageModel, default_device
from visproj.vlm.pretrained import PretrainedProjector


def encoder_of(projector: PretrainedProjector, given: str | None = None) -> VisionEncoder:
    """Load the vision encoder that a projector was trained with.

    Args:
        projector: Trained projector, which has the encoder's name or path.
        given: Current name or path of the encoder; ``None`` is that of the training.

    Raises:
        InputError: The encoder is not that of the training, or its directory cannot be used.
        ConnectionError, ModuleNotFoundError: The encoder or a package is missing.
    """
    encoder = load_encoder(_named(given, projector.encoder, OfflineEncoder.name))
    projector.check_encoder(encoder)
    return encoder


def model_of(
    projector: PretrainedProjector, encoder: VisionEncoder, given: str | None = None
) -> VisualLanguageModel:
    """Load the language model and combine all three in one model, on the GPU if there is one.

    Args:
        projector: Trained projector, which has the language model's name or path.
        encoder: Encoder from :func:`encoder_of`.
        given: Current name or path of the language model; ``None`` is that of the training.

    Raises:
        InputError: The language model's width is not the projector's, or it cannot be used.
        ConnectionError, ModuleNotFoundError: The model or a package is missing.
    """
    _, language, tokenizer = load_language_model(_named(given, projector.language_model, NAME))
    device = default_device()
    return VisualLanguageModel(
        encoder.to(device), projector.to(device), language.to(device), tokenizer
    ).eval()


def _named(given: str | None, trained_with: str, offline: str) -> str | None:
    """Return the name to load: the user's, else the checkpoint's; ``None`` if it is offline."""
    name = trained_with if given is None else given
    return None if name == offline else name
