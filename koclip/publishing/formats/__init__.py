"""Other formats of a model: ONNX, int8, sentence-transformers."""
