"""A CLIPModel's weights under open_clip's names."""

import torch
from torch import Tensor

RENAMED = {  # CLIPModel's name: open_clip's
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "transformer.resblocks",
    "self_attn.": "attn.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a `CLIPModel` state dict under open_clip's names: q, k and v stacked, projections transposed."""
    converted = {
        "visual.proj": state["visual_projection.weight"].T,
        "text_projection": state["text_projection.weight"].T,
    }
    for name, tensor in state.items():
        if name.startswith(("visual_projection", "text_projection")) or ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat([state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace("q_proj.", "in_proj_")
        for clip_name, open_clip_name in RENAMED.items():
            name = name.replace(clip_name, open_clip_name)
        converted[name] = tensor
    return converted
