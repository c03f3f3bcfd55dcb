"""Files in, batches of tensors out."""
