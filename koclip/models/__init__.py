"""Stock dual encoders: sizes, random weights, loading, another text tower, the published directory."""

from koclip.models.stock import StockModel

__all__ = ["StockModel"]
