"""Cut the vocabulary of a text encoder or a dual encoder: its tokenizer, and the rows of its embeddings.

The result is a directory of the same class. Tensors that depend on the vocabulary (token embeddings, and the output
layers of language models) keep the rows of the kept pieces; all other tensors stay the same. Both are bit for bit.
"""

import copy
import itertools
import json
import math
import shutil
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from koclip import storage
from koclip.config import TrimConfig, check
from koclip.models.dual_encoder import text_features
from koclip.models.pretrained import UNREADABLE, is_hub_id, read, unreadable
from koclip.models.stock import is_stock, longest_text, parts
from koclip.text import tokenizers
from koclip.text.tokenizers import COUNT_FROM_PADDING, LEGACY_EOS_ID, READS_END, SLOW_SIGLIP
from koclip.text.trim import FORMS, Change, Vocabulary, changes, held_out, scripts_of

_KEY = "model"  # configuration key, for error messages
# Weights in other formats: they would keep the whole vocabulary. Pickles are never read.
_OTHER_WEIGHTS = frozenset({".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".pkl"})
_OTHER_FOLDERS = frozenset({"onnx", "openvino", "adapter"})  # made from the weights before
_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.md", "*.jinja")  # files of a Hub repository
_PIECES = ("vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", "sentencepiece.bpe.model", "spiece.model")
_TOKENIZER, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_WEIGHTS, _INDEX = "model*.safetensors", "model.safetensors.index.json"
_CHECKED, _LONGEST = 64, 512  # texts whose embeddings are compared, and their longest length in tokens
_LENGTH, _CACHE_LINE = 8, 64  # bytes: of a safetensors file's first number; of memory that a CPU reads at once
_LISTED = 1_000  # texts that change in the report, of each group
REPORT, _CARD = "trim.json", "README.md"
_README = """\
{front}# {name}, trimmed

`koclip trim` has cut the vocabulary of {source}: it removed the pieces that the given texts do not use, from the
tokenizer and from the embeddings. A text whose pieces are all kept gets the same embedding, bit for bit. Other texts
get other pieces. `trim.json` has the numbers. The licence of the source applies.

| | before | after |
|---|--:|--:|
| pieces | {pieces} |
| bytes of weights and tokenizer | {bytes} |
"""


class Source:
    """The directory of a model with a text encoder.

    Args:
        path: Directory or Hub id of a text encoder, a dual encoder, or a sentence-transformers model with one text
            encoder.

    Raises:
        ConfigError: no text encoder is there in safetensors with a fast tokenizer, or there are several.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.root = _directory(path)
        self.folder = _text_folder(path, self.root)
        try:
            self.config: PreTrainedConfig = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
            self.tokenizer = tokenizers.read(str(self.folder))
        except UNREADABLE as error:
            raise unreadable(path, _KEY, "config.json and the files of a fast tokenizer", error) from error
        file = self.folder / _TOKENIZER
        self.vocabulary = Vocabulary(self.tokenizer, file if file.is_file() else None)
        largest, rows = max(self.tokenizer.get_vocab().values()), self.text_config.vocab_size
        check(largest < rows, "model: largest id of the tokenizer", largest, f"expected less than vocab_size {rows}")

    @property
    def text_config(self) -> Any:
        """The configuration of the text encoder."""
        return getattr(self.config, "text_config", self.config)

    def anchors(self) -> set[int]:
        """Return ids that must be kept: those that the configuration names, and those before an id that must not move.

        Some encoders count positions from the id of the padding token. In the first CLIPs, the configuration has 2 as
        the end token, which means the largest id.
        """
        config = self.text_config
        ids = {number for number in _token_ids(config.to_dict()).values() if number < config.vocab_size}
        if config.model_type in COUNT_FROM_PADDING:
            ids |= set(range(config.pad_token_id + 1))
        if config.model_type in READS_END:
            ids |= set(range(LEGACY_EOS_ID + 1))
        return ids


def trim(source: Source, texts: Sequence[str], config: TrimConfig) -> dict[str, Any]:
    """Write `source`, cut to the pieces that `texts` use, into `config.output_dir`; return the content of trim.json.

    Raises:
        ConfigError: the directory has other files, or the result differs for texts that use kept pieces only. Nothing
            is written then.
    """
    target = Path(config.output_dir)
    free = not target.exists() or (target / REPORT).is_file() or (target.is_dir() and not any(target.iterdir()))
    check(free, "output_dir", config.output_dir, "expected a new directory, or one with an earlier result")
    groups = {"given": [text for text in texts if not held_out(text, config.held_out)]}
    check(bool(groups["given"]), "held_out", config.held_out, f"too much of {len(texts)} texts: expected less")
    groups["held_out"] = [text for text in texts if held_out(text, config.held_out)]
    counts = source.vocabulary.count(groups["given"])
    frequent = {piece: count for piece, count in counts.items() if count >= config.min_count}
    kept = source.vocabulary.select(frequent, source.anchors(), scripts_of(groups["given"]), config.num_pieces)
    with storage.atomic(target) as partial:
        folder = write_trimmed(source, partial, kept)
        sizes = zip(num_bytes(source.folder), num_bytes(folder), strict=True)
        weights, both = ({"before": before, "after": after} for before, after in sizes)
        report = {
            "model": source.path,
            "tokenizer": source.vocabulary.kind,
            "pieces": {"before": source.text_config.vocab_size, "after": len(kept)},
            "bytes": both,
            "bytes_of_weights": weights,
            "held_out": config.held_out,
        } | _compare(source, folder, kept, groups)
        (partial / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (partial / _CARD).write_text(_readme(report), encoding="utf-8")
    return report


def _readme(report: Mapping[str, Any]) -> str:
    """Return the README.md of the result: the source's would describe another model."""
    path = report["model"]
    hub_id = path if is_hub_id(path) else None
    name = hub_id or Path(path).resolve().name  # the other parts of a path belong to this machine
    sizes = {key: "{before:,} | {after:,}".format(**report[key]) for key in ("pieces", "bytes")}
    front = f"---\nbase_model: {hub_id}\n---\n\n" if hub_id else ""
    link = f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else f"`{name}`"
    return _README.format(front=front, name=name, source=link, **sizes)


def _compare(source: Source, folder: Path, kept: Sequence[int], groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return how many texts of each group change, in NFC and NFD, and the first of them; check the others."""
    tokenizer, facts, covered = tokenizers.read(str(folder)), {}, []
    for group, form in itertools.product(groups, FORMS):
        texts = [unicodedata.normalize(form, text) for text in groups[group]]
        changed, same = changes(source.vocabulary, tokenizer, kept, texts)
        covered += same
        facts[f"{group}, {form}"] = {
            "texts": len(texts),
            "changed": len(changed),
            "share": len(changed) / max(1, len(texts)),
            "examples": [_as_item(change) for change in changed[:_LISTED]],
        }
    return {"texts": facts, "embeddings_compared": check_embeddings(source, folder, covered)}


def _as_item(change: Change) -> dict[str, str]:
    return {"text": change.text, "before": " ".join(change.before), "after": " ".join(change.after)}


def write_trimmed(source: Source, target: Path, kept: Sequence[int]) -> Path:
    """Write the model with the pieces `kept` only into a new directory; return the folder of its text encoder.

    Raises:
        ConfigError: a part of the model is only there as a pickle, or no tensor depends on the vocabulary.
    """
    folder = target / source.folder.relative_to(source.root)
    folder.mkdir(parents=True)
    for file in _other_files(source):
        copied = target / file.relative_to(source.root)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copied)
    settings = folder / _SETTINGS
    if not settings.is_file() or json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class") == SLOW_SIGLIP:
        source.tokenizer.save_pretrained(folder)  # the file does not name the class of a tokenizer.json
    _cut_weights(source, folder, kept)
    new = {old: rank for rank, old in enumerate(kept)}
    ids = {name: new[old] for name, old in _token_ids(source.text_config.to_dict()).items() if old in new}
    for place in _places(source):
        _edit(target / place / "config.json", lambda values: _cut_config(values, ids, new))
        _edit(target / place / "generation_config.json", lambda values: values | _renumbered(values, new))
        _edit(target / place / _SETTINGS, lambda values: _cut_settings(values, new))
        (target / place / _TOKENIZER).write_text(source.vocabulary.cut(kept), encoding="utf-8")
    for name in _PIECES:
        (folder / name).unlink(missing_ok=True)
    return folder


def check_embeddings(source: Source, folder: Path, texts: Sequence[str]) -> int:
    """Check that texts which use kept pieces only get the same embeddings; return how many were compared.

    Hidden states are compared at every token; of a dual encoder, the text embeddings.

    Args:
        source: The model before.
        folder: The text encoder after.
        texts: Such texts. Some of them are compared, spread over the list.

    Raises:
        ConfigError: an embedding or a problem with the weights differs.
    """
    before, problems = read(source.folder, _KEY)
    after, problems_after = read(folder, _KEY)
    same = problems == problems_after
    check(same, f"{_KEY}: problems with the cut weights", problems_after, f"expected those of the source: {problems}")
    for parameter in (*before.parameters(), *after.parameters()):
        parameter.data = parameter.data.clone()  # the files may map them to places that PyTorch adds up differently
    tokenizer = tokenizers.read(str(folder))
    compared = texts[:: max(1, len(texts) // _CHECKED)][:_CHECKED]
    for text in compared:
        first, second = _embedding(before, source.tokenizer, text), _embedding(after, tokenizer, text)
        difference = (first - second).abs().max().item() if first.shape == second.shape else math.inf
        fix = f"expected 0.0 for {text!r}: this model cannot be cut"
        check(difference == 0.0, f"{_KEY}: difference between the embeddings before and after", difference, fix)
    return len(compared)


def num_bytes(folder: Path) -> tuple[int, int]:
    """Return the sizes in bytes of a folder's weights, and of its weights and tokenizer together."""
    weights = sum(file.stat().st_size for file in folder.glob(_WEIGHTS))
    pieces = sum(file.stat().st_size for name in (_TOKENIZER, *_PIECES) if (file := folder / name).is_file())
    return weights, weights + pieces


def _directory(path: str) -> Path:
    """Return the directory of a model; files of a Hub repository are downloaded."""
    if Path(path).is_dir():
        return Path(path)
    expected = "config.json, model.safetensors and tokenizer.json"
    if not is_hub_id(path):
        raise unreadable(path, _KEY, expected, FileNotFoundError(path))
    try:
        return Path(snapshot_download(path, allow_patterns=list(_WANTED)))
    except UNREADABLE as error:
        raise unreadable(path, _KEY, expected, error) from error


def _text_folder(path: str, root: Path) -> Path:
    """Return the folder of a model that has weights and a tokenizer: the root itself, or a folder below it."""
    folders = [file.parent for file in sorted(root.rglob("config.json")) if _has_text_encoder(file.parent)]
    if root in folders:
        return root
    names = [str(folder.relative_to(root)) for folder in folders]
    fix = "expected exactly one folder with config.json, model.safetensors and a tokenizer (pickles are not read)"
    check(len(folders) == 1, f"{_KEY}: folders with a text encoder in {path}", names, fix)
    return folders[0]


def _has_text_encoder(folder: Path) -> bool:
    return any(folder.glob(_WEIGHTS)) and any((folder / name).is_file() for name in (_TOKENIZER, _SETTINGS, *_PIECES))


def _places(source: Source) -> list[Path]:
    """Return the folders with the tokenizer, from the root: the text encoder's, and the root if it has a copy.

    Raises:
        ConfigError: the root has another tokenizer.
    """
    own, copied = source.folder / _TOKENIZER, source.root / _TOKENIZER
    if source.folder == source.root or not copied.is_file():
        return [source.folder.relative_to(source.root)]
    same = own.is_file() and own.read_bytes() == copied.read_bytes()
    check(same, f"{_KEY}: tokenizers", [str(own), str(copied)], "which differ: expected the same file twice")
    return [source.folder.relative_to(source.root), Path()]


def _other_files(source: Source) -> Iterator[Path]:
    """Yield the files that stay the same or are edited: no weights, no pieces of the text encoder, no README.md.

    Raises:
        ConfigError: a module of a sentence-transformers model is only there as a pickle.
    """
    for file in sorted(path for path in source.root.rglob("*") if path.is_file()):
        place = file.relative_to(source.root).parts
        if any(name.startswith(".") or name in _OTHER_FOLDERS or name == _CARD for name in place):
            continue
        own = file.parent == source.folder
        if file.suffix in _OTHER_WEIGHTS:
            safe = own or any(file.parent.glob("*.safetensors"))
            check(safe, f"{_KEY}: weights", str(file), "a pickle or another format: expected model.safetensors")
        elif not own or not (file.match(_WEIGHTS) or file.name in (_TOKENIZER, *_PIECES)):
            yield file


def _cut_weights(source: Source, folder: Path, kept: Sequence[int]) -> None:
    """Write the weights of the text encoder's folder, with the rows of the kept pieces only."""
    rows, axes, num_cut, num_bytes = torch.tensor(kept), _vocabulary_axes(source.config), 0, 0
    for file in sorted(source.folder.glob(_WEIGHTS)):
        with safe_open(file, "pt") as opened:
            tensors, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
        for name, tensor in tensors.items():
            axis = next((axis for own, axis in axes.items() if _is_same(name, own)), None)
            if axis is not None:
                tensors[name] = tensor.index_select(axis, rows)
                num_cut += 1
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        _write_weights(folder / file.name, save(tensors, metadata), _start(file))
    check(num_cut > 0, f"{_KEY}: tensors with a row for each piece", 0, "expected token embeddings")
    _edit(folder / _INDEX, lambda values: values | {"metadata": values["metadata"] | {"total_size": num_bytes}})


def _start(file: Path) -> int:
    """Return the number of bytes before the first tensor of a safetensors file."""
    with file.open("rb") as opened:
        return _LENGTH + int.from_bytes(opened.read(_LENGTH), "little")


def _write_weights(file: Path, content: bytes, start: int) -> None:
    """Write a safetensors file whose tensors start at `start` modulo the length of a cache line.

    Tensors are used where the file is mapped into memory. On CPUs, the last bits of a product of matrices depend on
    where they start. The format allows spaces at the end of the header.
    """
    length = int.from_bytes(content[:_LENGTH], "little")
    spaces = (start - _LENGTH - length) % _CACHE_LINE
    with file.open("wb") as opened:
        opened.write((length + spaces).to_bytes(_LENGTH, "little"))
        opened.write(content[_LENGTH : _LENGTH + length] + b" " * spaces)
        opened.write(memoryview(content)[_LENGTH + length :])


def _vocabulary_axes(config: PreTrainedConfig) -> dict[str, int]:
    """Return the weights whose shape depends on the size of the vocabulary, with the axis that does.

    Two models with different sizes are built on PyTorch's meta device, without memory for their weights.
    """
    kind: Any = getattr(transformers, (config.architectures or [""])[0], None) or MODEL_MAPPING[type(config)]
    larger = copy.deepcopy(config)
    getattr(larger, "text_config", larger).vocab_size += 64
    with torch.device("meta"):
        first, second = (kind(each).state_dict() for each in (config, larger))
    pairs = {name: zip(tensor.shape, second[name].shape, strict=True) for name, tensor in first.items()}
    axes = {name: [axis for axis, sizes in enumerate(pair) if sizes[0] != sizes[1]] for name, pair in pairs.items()}
    return {name: changed[0] for name, changed in axes.items() if changed}


def _is_same(name: str, own: str) -> bool:
    """Return whether names of a weight in a file and in a class agree; either may have more levels in front."""
    return f".{name}".endswith(f".{own}") or f".{own}".endswith(f".{name}")


def _embedding(model: Any, tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Return the embedding of a text, or the hidden states (L, W) if the model has no embedding of texts."""
    tower = parts(model).text_tower if is_stock(model) else model
    length = min(longest_text(tokenizer, tower), _LONGEST)
    ids = torch.tensor([tokenizer(text, truncation=True, max_length=length)["input_ids"]])
    with torch.inference_mode():
        if is_stock(model):
            return text_features(model, ids, torch.ones_like(ids))
        encoder = model.get_encoder() if hasattr(model, "decoder") else model
        hidden: torch.Tensor = encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        return hidden


def _token_ids(values: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of special tokens in settings, by their names."""
    return {name: value for name, value in values.items() if name.endswith("_token_id") and type(value) is int}


def _renumbered(values: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """Return the ids of special tokens in settings with their new numbers. An item may be a list."""
    lists = {name: value for name, value in values.items() if name.endswith("_token_id") and isinstance(value, list)}
    return {name: new.get(value, value) for name, value in _token_ids(values).items()} | {
        name: [new.get(number, number) for number in numbers] for name, numbers in lists.items()
    }


def _cut_config(values: dict[str, Any], ids: Mapping[str, int], new: Mapping[int, int]) -> dict[str, Any]:
    """Set the size of the vocabulary and the ids of special tokens, also those that the file leaves to the class."""
    inner = [values[name] for name in ("text_config", "text_config_dict") if isinstance(values.get(name), dict)]
    if inner:
        values |= _renumbered(values, new)
    for text in inner or [values]:
        text |= {"vocab_size": len(new), **ids}
    return values


def _cut_settings(values: dict[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """Return tokenizer_config.json with new ids, which versions before 5 wrote into it."""
    added = values.get("added_tokens_decoder")
    if added:
        kept = {str(new[int(number)]): token for number, token in added.items() if int(number) in new}
        values |= {"added_tokens_decoder": kept}
    return values


def _edit(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the values of a JSON file, if it exists."""
    if file.is_file():
        values = change(json.loads(file.read_text(encoding="utf-8")))
        file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
