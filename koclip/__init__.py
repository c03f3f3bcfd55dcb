"""koclip: train, adapt and publish CLIP models for Korean and other languages."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "embed_images", "embed_texts", "load"]

if TYPE_CHECKING:
    from koclip.encoders.inference import embed_images, embed_texts, load


def __getattr__(name: str) -> Any:
    # Importing transformers takes seconds; `koclip.config` must stay fast for --help and for errors.
    if name in {"embed_images", "embed_texts", "load"}:
        from koclip.encoders import inference

        return getattr(inference, name)
    raise AttributeError(f"module 'koclip' has no attribute {name!r}")
