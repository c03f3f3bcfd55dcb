"""koclip: train, adapt and publish CLIP models for Korean and other languages."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Encoder", "__version__", "load"]

if TYPE_CHECKING:
    from koclip.encoders import Encoder, load


def __getattr__(name: str) -> Any:
    # Importing transformers takes seconds; `koclip.config` must stay fast for --help and for errors.
    if name in {"Encoder", "load"}:
        from koclip import encoders

        return getattr(encoders, name)
    raise AttributeError(f"module 'koclip' has no attribute {name!r}")
