"""How fast is frozen-image alignment next to open_clip's `--lock-image`, on a CPU?

    python recipes/benchmarks/align_speed.py                    # ViT-B/32, fp32, one thread, about 45 minutes
    python recipes/benchmarks/align_speed.py --pairs 256 --epochs 3 --image_tower vit_b16 --precision bf16 --cpu_time

Both align a Korean text encoder of RoBERTa-base's shape to a frozen CLIP image tower, with the same photos and
captions, and take turns in one process, epoch by epoch:

- open_clip: `train_one_epoch` on its `CustomTextCLIP` with the image tower locked, its HFTextEncoder (first token,
  linear projection), tokenizer (text padded to 77), transform, ClipLoss, AdamW groups and schedule. Photos are decoded,
  cropped and encoded again in every epoch;
- koclip: the training of recipes/align.py with `align.method: frozen_image`. It computes the image features first.

Both start from the same random weights: nothing is downloaded. Both keep the logit scale as it is, at 100. Learning
rate, batch size, clipping and dropout (0.1) are equal; the order of the pairs and the crops of the photos are not.
Captions are grouped by length, which is the default (data.length_pool), but within an epoch. Before the first epoch
both compute the loss of the same few pairs without dropout. After the last epoch both rank the photos for their
captions: R@10 with its 95 % interval. The ranked views are those of evaluation, on which koclip was trained and
open_clip was not: `--num_crops 11` trains koclip mostly on random crops, too.

All epochs take about the same time, so that a few are enough: the total of 10 epochs is the time of the features and 10
times the mean of `--epochs`. Times of an epoch and their ratio, taken within a turn, are median (lowest-highest). The
ratio of the totals includes the features; the brackets have the ratios for the lowest and the highest turn. Wall time
comes first, then CPU time; with `--cpu_time`, for busy machines, CPU time comes first. Bars of the project: 4x with
ViT-B/32, 6x with ViT-B/16.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from clip_shapes import build_clip
from pairs import CONTEXT, FLICKR8K_KO, some_pairs
from ratios import hardware, spread
from torch import Tensor
from tqdm import tqdm
from transformers import BertTokenizer, CLIPModel, RobertaConfig, RobertaModel

from koclip import training
from koclip.align.methods import adapt, set_trainable
from koclip.config import AlignConfig, DataConfig, ModelConfig, OptimConfig, SourceConfig, SwapConfig, TrainConfig
from koclip.data.batches import Assembler, Batch, Precomputed
from koclip.data.loader import train_loader
from koclip.data.order import BatchPart
from koclip.data.transforms import digest_of, view_size, views_for
from koclip.embeddings.fill import Cache, image_features
from koclip.encoders.transformers import TransformersEncoder
from koclip.metrics import first_ranks, share
from koclip.models.dual_encoder import DualEncoder
from koclip.models.pretrained import load_text_encoder
from koclip.models.stock import parts
from koclip.text.tokenizers import load, train_bpe

VOCAB = Path("data/koelectra/vocab.txt")  # of monologg/koelectra-base-v3-discriminator
EPOCHS = 10  # of a whole alignment
CHECKED = 16  # pairs whose loss is compared


class Start(NamedTuple):
    """The starting point of both."""

    clip: CLIPModel
    image_processor: Any
    encoder: Path  # directory of a text encoder and its tokenizer


class Seconds(NamedTuple):
    """The time of a turn."""

    wall: float
    cpu: float


class Turns(NamedTuple):
    """The turns of both."""

    open_clip: list[Seconds]  # per epoch
    koclip: list[Seconds]
    cache: Seconds


def timed(turn: Callable[[], object]) -> Seconds:
    """Run a function and return its time."""
    wall, cpu = time.perf_counter(), time.process_time()
    turn()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def starting_point(options: argparse.Namespace, captions: Sequence[str], folder: Path) -> Start:
    """Make a CLIP, whose text tower is small and unused, and a text encoder, both with random weights."""
    sizes = ModelConfig(preset=options.image_tower, text_width=64, text_layers=1, temperature=0.01)
    clip, processor = build_clip(sizes, train_bpe(captions, 600, CONTEXT))
    tokenizer = BertTokenizer(options.vocab, do_lower_case=False)
    text = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.text_width,
        num_hidden_layers=options.text_layers,
        num_attention_heads=options.text_width // 64,
        intermediate_size=4 * options.text_width,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        RobertaModel(text, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Start(clip, processor.image_processor, folder)


def config_of(options: argparse.Namespace, source: SourceConfig) -> AlignConfig:
    """Return the configuration of the alignment; open_clip uses its numbers, too."""
    steps = options.epochs * options.pairs // options.batch_size
    pool = min(DataConfig().length_pool, options.pairs // options.batch_size)
    return AlignConfig(
        model=SwapConfig(clip="random weights", text_encoder="random weights", pooling="first"),
        data=DataConfig(sources=[source], num_crops=options.num_crops, length_pool=pool),
        optim=OptimConfig(lr=options.lr, warmup_steps=steps // 10),
        train=TrainConfig(
            num_steps=steps,
            batch_size=options.batch_size,
            precision=options.precision,
            num_threads=options.threads,
            tracker="none",
        ),
    )


class Koclip:
    """The training of recipes/align.py for one stage with a frozen image tower; the first turn computes `features`."""

    def __init__(self, start: Start, config: AlignConfig, cache: Path) -> None:
        self._config, self._cache, self._clip = config, cache, start.clip
        encoder = load_text_encoder(str(start.encoder))
        tokenizer = load(str(start.encoder), CONTEXT, encoder.config)
        self.model, self.processor = adapt(config.model, start.clip, encoder, start.image_processor, tokenizer)
        self._views = views_for(config.data, start.image_processor)

    def prepare(self) -> None:
        """Make the cache of image features and all that a step needs."""
        config, dual_encoder = self._config, DualEncoder(self.model, self.processor)
        (stage,) = config.stages
        accelerator = training.start(config.train)
        set_trainable(dual_encoder, config, stage, self._clip)
        self.features = image_features(
            accelerator, dual_encoder, config.data, self._views, Cache(self._cache, config.align.cache_dtype)
        )
        self.trainer = training.prepare(accelerator, dual_encoder, config)
        known = Precomputed(images=self.features)
        assembler = Assembler(config.data, self.processor.tokenizer, self._views, known)
        batches = train_loader(assembler, BatchPart(config.train.batch_size))
        self._steps = training.steps(self.trainer, batches, 0, config.train.num_steps, config.train.log_every)

    def first_batch(self) -> Batch:
        """Return the first few pairs of training, with pixels."""
        return next(
            train_loader(Assembler(self._config.data, self.processor.tokenizer, self._views), BatchPart(CHECKED))
        )

    def train(self, num_steps: int) -> None:
        """Take the next steps."""
        for _ in itertools.islice(self._steps, num_steps):
            pass


@torch.no_grad()
def first_losses(own: Koclip, model: Any, images: Any) -> tuple[float, float]:
    """Return the loss of both on the same few pairs, in fp32 and without dropout."""
    from open_clip_peer import as_pairs, clip_loss

    batch = own.first_batch()
    encoder = own.trainer.dual_encoder.eval()
    inputs = batch.pixel_values, batch.input_ids, batch.attention_mask
    embeddings = DualEncoder.forward(encoder, *inputs)  # accelerate runs `encoder(...)` in the run's precision
    our_loss = own.trainer.loss(embeddings, *batch.targets).value
    return our_loss.item(), clip_loss(model.eval(), *as_pairs(batch, images)).item()


def recall_at_10(texts: Tensor, images: Tensor, captions: Sequence[str]) -> str:
    """Return text-to-image R@10 of unit-norm embeddings (N, D); equal captions find each other's images too."""
    numbers = {caption: number for number, caption in enumerate(captions)}
    ids = torch.tensor([numbers[caption] for caption in captions])
    metric = share(first_ranks(texts @ images.T, ids[:, None] == ids) < 10)
    return f"{metric.value:.1%} ({metric.ci95[0]:.1%}-{metric.ci95[1]:.1%})"


def compare(options: argparse.Namespace, folder: Path) -> tuple[Turns, str]:
    """Train both; return the times of their turns, and their results on the pairs."""
    from open_clip_peer import OpenClip, Photos, hf_tokenizer, locked

    pairs = some_pairs(options.data, options.pairs, folder)
    start = starting_point(options, pairs.captions, folder / "encoder")
    config = config_of(options, pairs.source)
    own = Koclip(start, config, folder / "features")
    projection = parts(own.model).text_projection.weight
    model: Any = locked(start.clip, start.encoder, projection)
    peer = OpenClip(model, config.optim, config.train.num_steps, {"bf16": "amp_bf16"}.get(options.precision, "fp32"))
    tokenize = hf_tokenizer(str(start.encoder), CONTEXT)
    photos = Photos(pairs.files, pairs.captions, view_size(start.image_processor), tokenize)
    loader = photos.loader(options.batch_size)

    turns = Turns([], [], cache=timed(own.prepare))
    losses = first_losses(own, model, start.image_processor)
    for _ in tqdm(range(options.epochs), unit="epoch", leave=False):
        turns.open_clip.append(timed(lambda: peer.train(loader)))
        turns.koclip.append(timed(lambda: own.train(len(loader))))

    images = torch.stack([own.features.embedding(digest_of(file.read_bytes())) for file in pairs.files])
    with torch.no_grad():
        peer_texts = torch.cat([model.eval().encode_text(part, True) for part in tokenize(pairs.captions).split(64)])
    by_library = {
        "koclip": TransformersEncoder(own.model, own.processor).encode_texts(pairs.captions),
        "open_clip": peer_texts,
    }
    lines = [f"R@10 of {name}: {recall_at_10(texts, images, pairs.captions)}" for name, texts in by_library.items()]
    return turns, "\n".join([f"first loss: koclip {losses[0]:.6f}, open_clip {losses[1]:.6f}", *lines])


def table(turns: Turns, cpu_time: bool) -> str:
    """Return seconds and ratios as a Markdown table."""
    peer, own = ([turn.cpu if cpu_time else turn.wall for turn in side] for side in (turns.open_clip, turns.koclip))
    cache = turns.cache.cpu if cpu_time else turns.cache.wall
    epochs = [f"{statistics.median(seconds):.1f} ({min(seconds):.1f}-{max(seconds):.1f})" for seconds in (peer, own)]
    totals = EPOCHS * statistics.mean(peer), cache + EPOCHS * statistics.mean(own)
    _, lowest_highest = spread([seconds + cache / EPOCHS for seconds in own], peer).split()
    cells = [*(f"{total:.1f}" for total in totals), f"{totals[0] / totals[1]:.2f} {lowest_highest}"]
    return "\n".join(
        [
            f"| {'CPU' if cpu_time else 'wall'} time, s | open_clip | koclip | ratio |",
            "|---|---|---|---|",
            f"| image features | | {cache:.1f} | |",
            f"| an epoch | {' | '.join(epochs)} | {spread(own, peer)} |",
            f"| {EPOCHS} epochs in all | {' | '.join(cells)} |",
        ]
    )


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    towers = ["vit_b32", "vit_b16", "small", "tiny"]
    cli.add_argument("--image_tower", choices=towers, default="vit_b32", help="(default: vit_b32)")
    cli.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    cli.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    cli.add_argument("--pairs", type=int, default=512, help="photos, with a caption each (default: 512)")
    cli.add_argument("--epochs", type=int, default=EPOCHS, help="epochs to measure (default: 10)")
    cli.add_argument("--text_width", type=int, default=768, help="of the text encoder (default: 768)")
    cli.add_argument("--text_layers", type=int, default=12, help="of the text encoder (default: 12)")
    cli.add_argument("--batch_size", type=int, default=64, help="pairs per step (default: 64)")
    cli.add_argument("--num_crops", type=int, default=1, help="views of a photo that koclip keeps (default: 1)")
    cli.add_argument("--lr", type=float, default=1e-4, help="peak learning rate (default: 1e-4)")
    cli.add_argument("--cpu_time", action="store_true", help="CPU time first (for one thread, on a busy machine)")
    cli.add_argument("--data", default=str(FLICKR8K_KO), help="a data.sources[].path (default: %(default)s)")
    cli.add_argument("--vocab", default=str(VOCAB), help="a WordPiece vocabulary (default: %(default)s)")
    return cli


def main(args: Sequence[str] | None = None) -> None:
    """Print the tables."""
    cli = parser()
    options = cli.parse_args(args)
    for name in ("data", "vocab"):
        if not Path(getattr(options, name)).exists():
            cli.exit(2, f"{cli.prog}: nothing at {getattr(options, name)}; name a file with --{name}\n")
    if options.pairs % options.batch_size:
        cli.exit(2, f"{cli.prog}: --pairs must be a multiple of --batch_size\n")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        turns, outcome = compare(options, Path(folder))
    print(f"{hardware()}; {options.precision}; torch {torch.__version__}, transformers {transformers.__version__}")
    print(
        f"{options.image_tower}, text encoder {options.text_width} wide with {options.text_layers} layers; "
        f"{options.pairs} pairs, batch {options.batch_size}, {options.epochs} epochs measured"
    )
    print(outcome)
    for cpu_time in (options.cpu_time, not options.cpu_time):
        print(table(turns, cpu_time))


if __name__ == "__main__":
    main()
