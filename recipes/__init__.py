"""What koclip does, one script each. Installed, they are `koclip.recipes`; in a checkout, run `recipes/pretrain.py`."""
