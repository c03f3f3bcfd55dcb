"""Tiny dual encoders of every class that evaluation takes, built from configurations and saved as published."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers as T
from helpers.kobert_files import CORPUS
from tiny import tiny_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from koclip.models.router import RouterConfig, RouterModel, save_preprocessing

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
VISION = WIDTH | {"image_size": 32, "patch_size": 8}
SIZE = {"height": 32, "width": 32}
LETTERS = sorted({letter for line in CORPUS for letter in line if not letter.isspace()})


def bert_tokenizer() -> Any:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    entries = [*special, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocab = {entry: place for place, entry in enumerate(entries)}
    return T.BertTokenizer(vocab=vocab, do_lower_case=False, model_max_length=40)


def xlmr_tokenizer() -> Any:
    """Its longest length is that of many published ones: none."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    entries = [(token, 0.0) for token in special] + [("▁", -1.0)] + [(letter, -2.0) for letter in LETTERS]
    return T.XLMRobertaTokenizer(vocab=[*entries, ("<mask>", 0.0)])


def t5_tokenizer(directory: Path) -> Any:
    model = io.BytesIO()
    options = {"vocab_size": 200, "hard_vocab_limit": False, "pad_id": 0, "eos_id": 1, "bos_id": -1, "unk_id": 2}
    options |= {"minloglevel": 2, "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS * 3), model_writer=model, **options)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "spiece.model").write_bytes(model.getvalue())
    return T.SiglipTokenizer(str(directory / "spiece.model"), model_input_names=["input_ids"], model_max_length=64)


def gemma_tokenizer(kind: Any) -> Any:
    """Every byte has a token, as Gemma's. The published ones pad on the right, which is not the class's default."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocab = {entry: place for place, entry in enumerate([*special, *(f"<0x{byte:02X}>" for byte in range(256))])}
    trained = Tokenizer(BPE(unk_token="<unk>"))
    trained.train_from_iterator([line.lower().replace(" ", "▁") for line in CORPUS], BpeTrainer(vocab_size=300))
    for entry in sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__):
        vocab.setdefault(entry, len(vocab))
    tokenizer = kind(vocab=vocab, merges=[], padding_side="right", model_max_length=64, model_input_names=["input_ids"])
    ending = TemplateProcessing(single=["$A", "<eos>"], special_tokens=[("<eos>", 1)])
    tokenizer.backend_tokenizer.post_processor = ending
    return tokenizer


def clip_images(**options: Any) -> Any:
    return T.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE, **options)


def two_towers(name: str, text: dict[str, Any], vision: dict[str, Any] = VISION, **options: Any) -> Any:
    config = getattr(T, name.replace("Model", "Config"))
    return getattr(T, name)(config(text_config=text, vision_config=vision, **options))


def joint(vision: Any, text: Any) -> Any:
    config = T.VisionTextDualEncoderConfig.from_vision_text_configs(vision.config, text.config, projection_dim=24)
    return T.VisionTextDualEncoderModel(config=config, vision_model=vision, text_model=text)


def clip(directory: Path) -> tuple[Any, Any]:
    tokenizer = tiny_tokenizer(40)
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    text = WIDTH | {"vocab_size": len(tokenizer), "max_position_embeddings": 40} | ends
    return two_towers("CLIPModel", text, projection_dim=24), T.CLIPProcessor(clip_images(), tokenizer)


def chinese(directory: Path) -> tuple[Any, Any]:
    tokenizer = bert_tokenizer()
    text = WIDTH | {"vocab_size": len(tokenizer), "max_position_embeddings": 40}
    model = two_towers("ChineseCLIPModel", text, projection_dim=24)
    return model, T.ChineseCLIPProcessor(T.ChineseCLIPImageProcessor(size=SIZE, crop_size=SIZE), tokenizer)


def alt(directory: Path) -> tuple[Any, Any]:
    tokenizer = xlmr_tokenizer()
    text = WIDTH | {"vocab_size": len(tokenizer), "max_position_embeddings": 42, "project_dim": 28, "pad_token_id": 1}
    return two_towers("AltCLIPModel", text, projection_dim=24), T.AltCLIPProcessor(clip_images(), tokenizer)


def metaclip2(directory: Path) -> tuple[Any, Any]:
    tokenizer = xlmr_tokenizer()
    ends = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    text = WIDTH | {"vocab_size": len(tokenizer), "max_position_embeddings": 40} | ends
    return two_towers("MetaClip2Model", text, projection_dim=24), T.CLIPProcessor(clip_images(), tokenizer)


def siglip_text(tokenizer: Any) -> dict[str, Any]:
    return WIDTH | {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": 0}


def siglip(directory: Path) -> tuple[Any, Any]:
    tokenizer = t5_tokenizer(directory.with_name(f"{directory.name}-tokenizer"))
    model = two_towers("SiglipModel", siglip_text(tokenizer))
    return model, T.SiglipProcessor(T.SiglipImageProcessor(size=SIZE), tokenizer)


def siglip2_fixed(directory: Path) -> tuple[Any, Any]:
    """SigLIP 2 of one resolution is published as a SiglipModel with Gemma's tokenizer."""
    tokenizer = gemma_tokenizer(T.GemmaTokenizer)
    model = two_towers("SiglipModel", siglip_text(tokenizer))
    return model, T.SiglipProcessor(T.SiglipImageProcessor(size=SIZE), tokenizer)


def siglip2_naflex(directory: Path) -> tuple[Any, Any]:
    tokenizer = gemma_tokenizer(T.Siglip2Tokenizer)
    vision = WIDTH | {"patch_size": 8, "num_patches": 16}
    model = two_towers("Siglip2Model", siglip_text(tokenizer), vision)
    return model, T.Siglip2Processor(T.Siglip2ImageProcessor(patch_size=8, max_num_patches=16), tokenizer)


def bert(tokenizer: Any) -> Any:
    return T.BertModel(T.BertConfig(**WIDTH, vocab_size=len(tokenizer), max_position_embeddings=40))


def joint_processor(tokenizer: Any) -> Any:
    return T.VisionTextDualEncoderProcessor(T.ViTImageProcessor(size=SIZE), tokenizer)


def joint_vit(directory: Path) -> tuple[Any, Any]:
    tokenizer = bert_tokenizer()
    return joint(T.ViTModel(T.ViTConfig(**VISION)), bert(tokenizer)), joint_processor(tokenizer)


def joint_clip_vision(directory: Path) -> tuple[Any, Any]:
    tokenizer = xlmr_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 42, "pad_token_id": 1, "type_vocab_size": 1}
    text = T.XLMRobertaModel(T.XLMRobertaConfig(**WIDTH, **sizes))
    return joint(T.CLIPVisionModel(T.CLIPVisionConfig(**VISION)), text), joint_processor(tokenizer)


def joint_timm(directory: Path) -> tuple[Any, Any]:
    tokenizer = bert_tokenizer()
    config = T.TimmWrapperConfig(architecture="test_resnet")
    tower = T.TimmWrapperModel(config).eval()
    with torch.no_grad():
        config.hidden_size = tower(torch.zeros(1, 3, 32, 32)).pooler_output.shape[1]
    return joint(tower, bert(tokenizer)), joint_processor(tokenizer)


def router(directory: Path) -> tuple[Any, Any]:
    tokenizer = bert_tokenizer()
    text = T.ModernBertModel(T.ModernBertConfig(**WIDTH, vocab_size=len(tokenizer), pad_token_id=0))
    vision = T.CLIPVisionModel(T.CLIPVisionConfig(**VISION))
    config = RouterConfig.from_vision_text_configs(vision.config, text.config, projection_dim=24, pooling="mean")
    return RouterModel(config, vision, text), T.VisionTextDualEncoderProcessor(clip_images(), tokenizer)


KINDS: dict[str, Callable[[Path], tuple[Any, Any]]] = {
    "CLIP": clip,
    "ChineseCLIP": chinese,
    "AltCLIP": alt,
    "MetaCLIP 2": metaclip2,
    "SigLIP": siglip,
    "SigLIP 2": siglip2_fixed,
    "SigLIP 2 NaFlex": siglip2_naflex,
    "joint ViT": joint_vit,
    "joint CLIP": joint_clip_vision,
    "joint timm": joint_timm,
    "Router": router,
}


def draw(model: torch.nn.Module) -> None:
    """Give a model random weights, biases and norms too, so that a part left out would show."""
    for name, parameter in model.named_parameters():
        scale = parameter.ndim == 1 and name.endswith("weight")  # of a norm: near 0, all embeddings would be alike
        torch.nn.init.normal_(parameter, mean=float(scale), std=0.3)


def saved(kind: str, directory: Path) -> Path:
    """Save a model of random weights as it is published."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(kind))
        model, processor = KINDS[kind](directory)
        draw(model)
    model.save_pretrained(directory)
    if isinstance(model, RouterModel):
        save_preprocessing(directory, processor)
    processor.save_pretrained(directory)
    return directory
