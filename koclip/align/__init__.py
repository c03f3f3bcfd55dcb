"""Ways to give a CLIP another text encoder, or to adapt its own."""
