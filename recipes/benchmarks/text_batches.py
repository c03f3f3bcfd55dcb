"""The speed of ways to batch captions, in a training step of CLIP's text transformer on a CPU.

    python recipes/benchmarks/text_batches.py                   # fp32, one thread, about 5 minutes
    python recipes/benchmarks/text_batches.py --precision bf16 --cpu_time

Five ways take turns in one process, forward and backward, over the same captions of the same 8 batches:

- padded to 77, the context length, as the CLIP paper's code and open_clip do;
- padded to the batch's longest caption;
- length groups: the same, for the loader's batches of similar caption length (data.length_pool: 8);
- packed: no padding. The captions of a batch follow one another, a few per row, in rows of about equal length; each
  caption has its own positions and attends only to itself;
- packed length groups: both.

Each way runs through the stock CLIPModel and through koclip's (`koclip.models.fast.speed_up`). Packing cannot use its
`LastLayer`, which computes one token per row, and has another last layer, which computes the end of every caption.
Before the measurement, the embeddings of every way are compared with stock embeddings padded to 77.

A time is the median of a step over the rounds; a ratio is taken within a round, and the table has its median, lowest
and highest value. A round is one step of each of the 8 batches; the first round does not count. The work of the loader
(padding, packing) is not timed, the work of the model (masks) is. On a busy machine, use `--cpu_time` to count CPU time
instead of wall time.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
import transformers
from pairs import CONTEXT, FLICKR8K_KO, padded, record
from ratios import add_timing_options, hardware, spread
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel, PreTrainedTokenizerBase
from transformers.masking_utils import create_causal_mask
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from koclip.config import DataConfig, ModelConfig, SourceConfig
from koclip.data.batches import Batch
from koclip.data.loader import training_captions
from koclip.models.dual_encoder import encode_texts, from_scratch
from koclip.models.fast import LastLayer, speed_up
from koclip.text.tokenizers import train_bpe

POOL = 8  # batches of a length group, and of a round
TOLERANCE = 1e-5  # on the elements of unit-norm embeddings
WAYS = ("padded to 77", "padded to the longest", "length groups", "packed", "packed length groups")


class Text(NamedTuple):
    """One batch of B captions, arranged in one way."""

    embed: Callable[[CLIPModel], Tensor]  # (B, D) unit norm
    places: int  # tokens that the transformer computes, padding included
    batch: Batch


class Rows(NamedTuple):
    """B captions packed into R rows of L tokens, G per row; the tokens after a row's last caption are padding."""

    ids: Tensor  # (R, L)
    positions: Tensor  # (R, L) within the caption
    ends: Tensor  # (R, G) where each caption ends
    order: Tensor  # (B,) where to find each caption of the batch among the R x G


def pack(batch: Batch, per_row: int) -> Rows:
    """Pack a batch, `per_row` captions per row, long with short ones, so that rows have about equal length."""
    lengths = batch.attention_mask.sum(dim=1)
    dealt = lengths.argsort(descending=True).view(per_row, -1)
    dealt[1::2] = dealt[1::2].flip(1)
    captions = dealt.T  # (R, G)
    stops = lengths[captions].cumsum(1)
    places = torch.arange(int(stops.max())).repeat(len(captions), 1)
    number = torch.searchsorted(stops, places, right=True)  # (R, L) of the caption in its row, G after the last
    positions = places - F.pad(stops, (1, 0)).gather(1, number)
    positions = positions.clamp(max=batch.input_ids.shape[1] - 1)
    ids = batch.input_ids[F.pad(captions, (0, 1)).gather(1, number), positions]
    return Rows(ids, positions, stops - 1, captions.flatten().argsort())


def encode_rows(model: CLIPModel, rows: Rows) -> Tensor:
    """Return `encode_texts` of packed captions, in the order of the batch."""
    text = model.text_model
    hidden = text.embeddings.token_embedding(rows.ids) + text.embeddings.position_embedding(rows.positions)
    # (R, 1, L, L); a caption begins at position 0, and attends only to itself
    mask = cast(Tensor, create_causal_mask(text.config, hidden, None, None, rows.positions))
    *layers, last = text.encoder.layers
    for layer in layers:
        hidden = layer(hidden, mask)
    number = torch.arange(len(rows.ids))[:, None]
    if isinstance(last, LastLayer):
        ends = last_layer(last, hidden, mask[number, :, rows.ends].transpose(1, 2), rows.ends)
    else:
        ends = last(hidden, mask)[number, rows.ends]
    features: Tensor = model.text_projection(text.final_layer_norm(ends)).flatten(0, 1)
    return F.normalize(features[rows.order].float(), dim=-1)


def last_layer(layer: CLIPEncoderLayer, hidden: Tensor, mask: Tensor, ends: Tensor) -> Tensor:
    """Return the output (R, G, D) of `layer` for the tokens at `ends` (R, G), with their `mask` (R, 1, G, L)."""
    attention, normed = layer.self_attn, layer.layer_norm1(hidden)
    number = torch.arange(len(ends))[:, None]
    query, keys, values = (
        tensor.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)
        for tensor in (attention.q_proj(normed[number, ends]), attention.k_proj(normed), attention.v_proj(normed))
    )
    mixed = F.scaled_dot_product_attention(query, keys, values, mask, scale=attention.scale)
    token: Tensor = hidden[number, ends] + attention.out_proj(mixed.transpose(1, 2).flatten(2))
    token = token + layer.mlp(layer.layer_norm2(token))
    return token


def as_padded(batch: Batch, pad_id: int, length: int | None = None) -> Text:
    """Return a batch padded to `length` tokens, to its longest caption if that is None."""
    length = length or batch.input_ids.shape[1]
    ids, mask = padded(batch.input_ids, pad_id, length), padded(batch.attention_mask, 0, length)
    return Text(lambda model: encode_texts(model, ids, mask), ids.numel(), batch)


def as_packed(batch: Batch, per_row: int) -> Text:
    """Return a batch packed without padding."""
    rows = pack(batch, per_row)
    return Text(lambda model: encode_rows(model, rows), rows.ids.numel(), batch)


def arrange(data: DataConfig, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> list[list[Text]]:
    """Return the round's captions in each of the WAYS."""
    mixed, grouped = (
        record(DataConfig(sources=data.sources, length_pool=pool), tokenizer, 16, options.batch_size, POOL)
        for pool in (1, POOL)
    )
    pad_id = tokenizer.pad_token_id
    return [
        [as_padded(batch, pad_id, CONTEXT) for batch in mixed],
        [as_padded(batch, pad_id) for batch in mixed],
        [as_padded(batch, pad_id) for batch in grouped],
        [as_packed(batch, options.captions_per_row) for batch in mixed],
        [as_packed(batch, options.captions_per_row) for batch in grouped],
    ]


@torch.no_grad()
def check(models: Sequence[CLIPModel], ways: Sequence[Sequence[Text]], pad_id: int) -> float:
    """Return the largest difference of any way and model from the first model's embeddings padded to 77."""
    largest = 0.0
    for name, (text, *_) in zip(WAYS, ways, strict=True):
        expected = as_padded(text.batch, pad_id, CONTEXT).embed(models[0])
        for model in models:
            difference = (text.embed(model) - expected).abs().max().item()
            assert difference <= TOLERANCE, f"{name}: embeddings differ by {difference:.1e} from those padded to 77"
            largest = max(largest, difference)
    return largest


def measure(
    models: Sequence[CLIPModel], ways: Sequence[Sequence[Text]], options: argparse.Namespace
) -> list[list[list[float]]]:
    """Return the seconds of each round, per model and way."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    gradient = F.normalize(torch.randn(options.batch_size, models[0].text_projection.out_features), dim=-1)
    seconds: list[list[list[float]]] = [[[] for _ in ways] for _ in models]
    for _ in tqdm(range(options.rounds + 1), unit="round", leave=False):
        for model, times in zip(models, seconds, strict=True):
            for texts, own in zip(ways, times, strict=True):
                began = clock()
                for text in texts:
                    with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
                        embeddings = text.embed(model)
                    embeddings.backward(gradient)
                    model.zero_grad()
                own.append(clock() - began)
    return [[own[1:] for own in times] for times in seconds]


def table(seconds: Sequence[Sequence[Sequence[float]]], ways: Sequence[Sequence[Text]]) -> str:
    """Return padding, milliseconds of a step and its relative speed, as a Markdown table."""
    rows = ["| text | padding |", "|---|---|"]
    for name in ("stock", "koclip"):
        rows[0] += f" {name}, ms | over 77 | over length groups |"
        rows[1] += "---|---|---|"
    for number, (name, texts) in enumerate(zip(WAYS, ways, strict=True)):
        tokens = sum(int(text.batch.attention_mask.sum()) for text in texts)
        cells = [name, f"{1 - tokens / sum(text.places for text in texts):.1%}"]
        for times in seconds:
            own = times[number]
            cells += [f"{1000 * statistics.median(own) / len(texts):.0f}", spread(own, times[0]), spread(own, times[2])]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument(
        "--captions", default=str(FLICKR8K_KO), help="pairs: a local data.sources[].path (default: %(default)s)"
    )
    cli.add_argument("--column", default="captions_ko", help="their captions (default: captions_ko)")
    cli.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    add_timing_options(cli, rounds=5)
    cli.add_argument("--batch_size", type=int, default=64, help="captions per step (default: 64)")
    cli.add_argument("--captions_per_row", type=int, default=4, help="of packed text (default: 4)")
    cli.add_argument("--width", type=int, default=256, help="of the text transformer (default: 256)")
    cli.add_argument("--layers", type=int, default=6, help="of the text transformer (default: 6)")
    return cli


def main(args: Sequence[str] | None = None) -> None:
    """Print the table."""
    cli = parser()
    options = cli.parse_args(args)
    if not Path(options.captions).exists():
        cli.exit(2, f"{cli.prog}: no captions at {options.captions}; name a file of pairs with --captions\n")
    if options.batch_size % options.captions_per_row:
        cli.exit(2, f"{cli.prog}: --batch_size must be a multiple of --captions_per_row\n")
    torch.set_num_threads(options.threads)
    data = DataConfig(sources=[SourceConfig(path=options.captions, captions={"ko": options.column})])
    tokenizer = train_bpe(training_captions(data), vocab_size=49_152, max_tokens=CONTEXT)
    sizes = ModelConfig(
        preset="vit_b32", image_width=64, image_layers=1, text_width=options.width, text_layers=options.layers
    )  # the image tower stands idle
    stock = from_scratch(sizes, tokenizer)[0]
    assert isinstance(stock, CLIPModel)
    fast = copy.deepcopy(stock)
    speed_up(fast, torch.device("cpu"))
    ways = arrange(data, tokenizer, options)
    largest = check([stock, fast], ways, tokenizer.pad_token_id)
    seconds = measure([stock, fast], ways, options)
    lengths = torch.cat([text.batch.attention_mask.sum(dim=1) for text in ways[0]])
    print(f"{hardware()}; {options.precision}; torch {torch.__version__}, transformers {transformers.__version__}")
    print(
        f"{data.sources[0].short_name}: {lengths.float().mean():.1f} tokens a caption, at most {lengths.max()}; "
        f"vocabulary {len(tokenizer):,}; width {options.width}, {options.layers} layers; "
        f"{options.captions_per_row} packed a row"
    )
    print(
        f"batch {options.batch_size}, {options.rounds} rounds of {POOL} steps{', CPU time' * options.cpu_time}; "
        f"embeddings differ by {largest:.0e} at most"
    )
    print(table(seconds, ways))


if __name__ == "__main__":
    main()
