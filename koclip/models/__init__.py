"""Stock dual encoders: sizes, random weights, loading, another text tower, the published directory."""

from typing import TypeAlias

from transformers import ChineseCLIPModel, CLIPModel, VisionTextDualEncoderModel

StockModel: TypeAlias = CLIPModel | ChineseCLIPModel | VisionTextDualEncoderModel
