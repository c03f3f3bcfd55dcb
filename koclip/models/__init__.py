"""Parameters: building, wrapping, loading and embedding with dual encoders."""

from typing import TypeAlias

from transformers import CLIPModel, VisionTextDualEncoderModel

StockModel: TypeAlias = CLIPModel | VisionTextDualEncoderModel
