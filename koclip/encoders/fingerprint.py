"""Know a module by what it computes."""

import json
from typing import Any, cast

from torch import nn
from xxhash import xxh3_128

# What a configuration says besides what is computed: a tower is the same in any class, folder and version.
_NAMES = {"model_type", "architectures", "_name_or_path", "transformers_version", "dtype"}


def fingerprint(*parts: nn.Module | str) -> str:
    """Return a hash of modules, by their weights and their configuration but for names, and of texts."""
    digest = xxh3_128()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
            continue
        settings: Any = getattr(part, "config", None)
        if hasattr(settings, "to_diff_dict"):
            computed = {name: _unnamed(one) for name, one in settings.to_diff_dict().items() if name not in _NAMES}
            digest.update(json.dumps(computed, sort_keys=True, default=str).encode())
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(cast(Any, tensor.detach().float().cpu().contiguous().numpy()))
    return digest.hexdigest()


def _unnamed(setting: Any) -> Any:
    """Leave where a part came from out of its configuration. Its type stays: BERT and RoBERTa share weights' names."""
    if not isinstance(setting, dict):
        return setting
    return {name: _unnamed(one) for name, one in setting.items() if name == "model_type" or name not in _NAMES}
