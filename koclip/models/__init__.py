"""Stock dual encoders: sizes, random weights, loading, swapping the text tower, saving."""

from koclip.models.stock import StockModel

__all__ = ["StockModel"]
