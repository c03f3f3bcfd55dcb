"""Parameters: building, wrapping, loading and embedding with dual encoders."""

from typing import TypeAlias

from transformers import ChineseCLIPModel, CLIPModel, VisionTextDualEncoderModel

StockModel: TypeAlias = CLIPModel | ChineseCLIPModel | VisionTextDualEncoderModel
