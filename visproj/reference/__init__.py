"""Reference projectors, the oracle of the tests: slow, and without any of the fast code."""

from visproj.reference.projectors import (
    linear_projector_ref,
    perceiver_projector_ref,
    projector_ref,
    vit_projector_ref,
)

__all__ = [
    "linear_projector_ref",
    "perceiver_projector_ref",
    "projector_ref",
    "vit_projector_ref",
]
