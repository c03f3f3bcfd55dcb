"""Does koclip measure the same numbers as CLIP_benchmark?

    python recipes/benchmarks/parity_clip_benchmark.py                               # half a minute on one core
    python recipes/benchmarks/parity_clip_benchmark.py --model runs/x/model --data pairs.parquet

The same embeddings go through koclip's evaluation (`koclip.evaluation`) and through CLIP_benchmark's own
`zeroshot_retrieval.evaluate` and `zeroshot_classification.evaluate`, without autocast. By default they are synthetic:
the captions of an image (one, or one to seven) and the prompts of a class are noise around it, so that no share is 0 or
1. The exit code is 1 if a number differs by more than 1e-6.

With --model and --data, they are a model's embeddings of real pairs. For koclip, equal captions are one caption with
several images; for CLIP_benchmark, they are several captions with one image each. The numbers of all pairs are printed;
the numbers of captions that occur once must agree.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import koclip
from koclip.config import EvalSetConfig, SourceConfig
from koclip.data.sources import Row
from koclip.encoders import Encoder
from koclip.evaluation.embed import Embedder, Images
from koclip.evaluation.sets import EvalSet, open_set
from koclip.evaluation.tasks import retrieval, zero_shot
from koclip.metrics import KS, Metric
from koclip.text.classes import ClassName, fill, spelt_out

TOLERANCE = 1e-6
WIDTH = 64  # of made-up embeddings
TEMPLATES = ["{label} 사진", "{label:을/를} 찍은 사진", "{label:이/가} 있는 사진"]
Numbers = dict[str, float]


class Given(Encoder):
    """An encoder with given embeddings of texts; the evaluation gets those of images directly."""

    def __init__(self, texts: dict[str, Tensor]) -> None:
        super().__init__(torch.nn.Identity(), None, "given")
        self._texts = texts

    def _embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings (B, D)."""
        return torch.stack([self._texts[text] for text in texts])

    def _embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Raise an error: the benchmark has no images."""
        raise NotImplementedError("made-up embeddings have no images")

    _image_features = _embed_images

    def unknown_share(self, texts: Sequence[str]) -> float:
        """Return 0: every text is known."""
        return 0.0

    def fingerprint(self) -> str:
        """Return a name."""
        return self.name


class Pairs(NamedTuple):
    """Embeddings of images and captions, of any length."""

    images: Tensor  # (N, D)
    texts: dict[str, Tensor]  # by caption, (D,)
    captions: list[list[str]]  # by image


class Classes(NamedTuple):
    """Embeddings of images and prompts, of any length."""

    images: Tensor  # (N, D)
    texts: dict[str, Tensor]  # by prompt, (D,)
    names: list[str]
    labels: Tensor  # (N,)


class Line(NamedTuple):
    """A number from both libraries."""

    case: str
    name: str
    koclip: float
    peer: float

    @property
    def difference(self) -> float:
        """The absolute difference."""
        return abs(self.koclip - self.peer)


def made_up_pairs(seed: int, counts: Sequence[int], num_images: int = 500) -> Pairs:
    """Return images with captions around them; `counts` are the numbers of captions."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_images, WIDTH, generator=generator)
    captions = [
        [f"사진 {image}의 설명 {number}" for number in range(counts[image % len(counts)])]
        for image in range(num_images)
    ]
    texts = {
        text: images[image] + 2.5 * torch.randn(WIDTH, generator=generator)
        for image, own in enumerate(captions)
        for text in own
    }
    return Pairs(images, texts, captions)


def made_up_classes(seed: int, num_classes: int = 40, num_images: int = 1_000) -> Classes:
    """Return classes of different sizes whose prompts and images lie around them."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, WIDTH, generator=generator)
    labels = (num_classes * torch.rand(num_images, generator=generator) ** 2).long()  # the first are the largest
    labels[:num_classes] = torch.arange(num_classes)
    images = centres[labels] + 2.5 * torch.randn(num_images, WIDTH, generator=generator)
    names = [f"{number}번 물건" if number % 2 else f"{number}번 동물 무리" for number in range(num_classes)]
    texts = {
        fill(template, name): centre + 2 * torch.randn(WIDTH, generator=generator)
        for name, centre in zip(names, centres, strict=True)
        for template in ["{}", *TEMPLATES, *map(spelt_out, TEMPLATES)]  # all that koclip's evaluation compares
    }
    return Classes(images, texts, names, labels)


def real_pairs(model: str, data: str, column: str, max_images: int) -> Pairs:
    """Return a model's embeddings of a table's images and captions."""
    source = SourceConfig(path=data, captions={"ko": column})
    eval_set = open_set(EvalSetConfig(source=source, max_images=max_images))
    embedder = Embedder(koclip.load(model), batch_size=64)
    captions = eval_set.texts("ko")
    texts = list(dict.fromkeys(text for own in captions for text in own))
    embedded = embedder.texts(texts)
    return Pairs(embedder.images(eval_set.images), dict(zip(texts, embedded, strict=True)), captions)


def first_captions(pairs: Pairs) -> Pairs:
    """Return the pairs with each image's first caption alone."""
    return pairs._replace(captions=[own[:1] for own in pairs.captions])


def unique(pairs: Pairs) -> Pairs:
    """Return the pairs without repeated captions, and without images that have no other captions."""
    counts = Counter(text for own in pairs.captions for text in own)
    captions = [[text for text in own if counts[text] == 1] for own in pairs.captions]
    kept = [image for image, own in enumerate(captions) if own]
    return Pairs(pairs.images[kept], pairs.texts, [captions[image] for image in kept])


def koclip_retrieval(pairs: Pairs) -> Numbers:
    """Return the recalls of `koclip.evaluation.tasks.retrieval`, both directions."""
    eval_set = _eval_set([{"ko": own} for own in pairs.captions], EvalSetConfig())
    images = F.normalize(pairs.images, dim=-1)
    metrics = retrieval.retrieval(Embedder(Given(pairs.texts), batch_size=64), eval_set, "ko", images)
    names = [f"{direction}/recall@{k}" for direction in ("text_to_image", "image_to_text") for k in KS]
    return _values(metrics, names)


def koclip_zero_shot(classes: Classes) -> Numbers:
    """Return the accuracies of `koclip.evaluation.tasks.zero_shot`, of the ensemble of all templates."""
    config = EvalSetConfig(
        source=SourceConfig(path="none", label="label"),
        tasks=["zero_shot"],
        classes="none",
        templates={"ko": list(TEMPLATES)},
    )
    named = [ClassName(str(number), {"ko": name}, {}) for number, name in enumerate(classes.names)]
    eval_set = _eval_set([{} for _ in classes.labels], config, named, classes.labels.tolist())
    images = F.normalize(classes.images, dim=-1)
    metrics = zero_shot.zero_shot(Embedder(Given(classes.texts), batch_size=64), eval_set, "ko", images)
    return _values(metrics, ["zero_shot/accuracy", "zero_shot/accuracy@5", "zero_shot/mean_per_class"])


def _eval_set(
    captions: list[dict[str, list[str]]],
    config: EvalSetConfig,
    classes: Sequence[ClassName] = (),
    labels: Sequence[int] = (),
) -> EvalSet:
    rows = [Row(b"", own, str(number)) for number, own in enumerate(captions)]
    return EvalSet("given", config, Images(rows), captions, {}, classes=list(classes), labels=list(labels))


def _values(metrics: dict[str, Metric], names: Sequence[str]) -> Numbers:
    return {name: metrics[name].value for name in names}


def compare_retrieval(case: str, pairs: Pairs) -> list[Line]:
    """Return the recalls of both."""
    import clip_benchmark_peer

    peer = clip_benchmark_peer.retrieval(pairs.images, pairs.texts, pairs.captions, KS)
    return [Line(case, name, value, peer[name]) for name, value in koclip_retrieval(pairs).items()]


def compare_zero_shot(case: str, classes: Classes) -> list[Line]:
    """Return the accuracies of both."""
    import clip_benchmark_peer

    prompts = {name: [fill(template, name) for template in TEMPLATES] for name in classes.names}
    peer = clip_benchmark_peer.zero_shot(classes.images, classes.texts, prompts, classes.labels)
    return [Line(case, name, value, peer[name]) for name, value in koclip_zero_shot(classes).items()]


def made_up(seeds: Sequence[int]) -> list[Line]:
    """Return all numbers of synthetic embeddings."""
    lines = []
    for seed in seeds:
        several = made_up_pairs(seed, counts=[1, 5, 3, 7, 2])
        lines += compare_retrieval(f"1 to 7 captions, seed {seed}", several)
        lines += compare_retrieval(f"first captions, seed {seed}", first_captions(several))
        lines += compare_retrieval(f"one caption each, seed {seed}", made_up_pairs(seed + 100, counts=[1]))
        lines += compare_zero_shot(f"{len(TEMPLATES)} prompts a class, seed {seed}", made_up_classes(seed))
    return lines


def table(lines: Sequence[Line]) -> str:
    """Return a Markdown table of all numbers."""
    rows = ["| case | number | koclip | CLIP_benchmark | difference |", "|---|---|---|---|---|"]
    return "\n".join(
        [
            *rows,
            *(f"| {case} | {name} | {own:.6f} | {peer:.6f} | {own - peer:+.1e} |" for case, name, own, peer in lines),
        ]
    )


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--seeds", type=int, default=3, help="made-up embeddings are drawn so often (default: 3)")
    cli.add_argument("--model", help="a model whose embeddings are compared instead of made-up ones")
    cli.add_argument("--data", help="a table of images and captions to embed with it")
    cli.add_argument("--captions", default="captions_ko", help="its column of captions (default: captions_ko)")
    cli.add_argument("--max_images", type=int, default=0, help="images to use, the first ones (default: all)")
    cli.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    return cli


def main(args: Sequence[str] | None = None) -> int:
    """Print the comparison; return the exit code."""
    options = parser().parse_args(args)
    if bool(options.model) != bool(options.data):
        parser().error("--model and --data go together: expected both or neither")
    torch.set_num_threads(options.threads)
    if options.model:
        pairs = real_pairs(options.model, options.data, options.captions, options.max_images)
        once, first = unique(pairs), unique(first_captions(pairs))
        print(
            table([*compare_retrieval("all", pairs), *compare_retrieval("all, first captions", first_captions(pairs))])
        )
        print(
            f"\nOf {_size(pairs)} are left with captions that occur once: {_size(once)}; first captions: {_size(first)}"
        )
        lines = [*compare_retrieval("once", once), *compare_retrieval("once, first captions", first)]
    else:
        lines = made_up(range(options.seeds))
    print(table(lines))
    largest = max(line.difference for line in lines)
    verdict = "equal" if largest <= TOLERANCE else "DIFFERENT"
    print(f"{verdict}: largest difference of {len(lines)} numbers {largest:.1e}, allowed {TOLERANCE:.0e}")
    return int(largest > TOLERANCE)


def _size(pairs: Pairs) -> str:
    return f"{len(pairs.images):,} images with {sum(map(len, pairs.captions)):,} captions"


if __name__ == "__main__":
    raise SystemExit(main())
