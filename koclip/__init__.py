"""koclip: train, adapt and publish CLIP models for Korean and other languages."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Classifier", "Encoder", "__version__", "load", "load_classifier"]

if TYPE_CHECKING:
    from koclip.classifiers.directory import Classifier, load_classifier
    from koclip.encoders import Encoder, load


def __getattr__(name: str) -> Any:
    # Importing transformers takes seconds; `koclip.config` must stay fast for --help and for errors.
    if name in {"Encoder", "load"}:
        from koclip import encoders

        return getattr(encoders, name)
    if name in {"Classifier", "load_classifier"}:
        from koclip.classifiers import directory

        return getattr(directory, name)
    raise AttributeError(f"module 'koclip' has no attribute {name!r}")
