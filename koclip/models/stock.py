"""The stock classes that koclip trains and publishes, and where their parts are."""

from typing import Any

from torch import nn


def longest_text(tokenizer: Any, text_tower: nn.Module) -> int:
    """Return the most tokens that both the tokenizer and the tower's positions take."""
    return min([int(tokenizer.model_max_length), *map(len, positions(text_tower).values())])


def positions(text_tower: nn.Module) -> dict[str, range]:
    """Return the rows that a text's tokens take in each of a tower's tables of positions, by the table's name.

    RoBERTas count from the row after the padding token's id.
    """
    return {
        name: range(0 if module.padding_idx is None else module.padding_idx + 1, module.num_embeddings)
        for name, module in text_tower.named_modules()
        if isinstance(module, nn.Embedding) and name.endswith(("position_embedding", "position_embeddings"))
    }
