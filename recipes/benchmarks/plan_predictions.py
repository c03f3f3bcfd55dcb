"""How well `koclip plan` predicts: three settings are measured, 17 others are predicted and then measured.

    python recipes/benchmarks/plan_predictions.py \
      --clip timm/tf_efficientnet_lite0.in1k --text_encoder intfloat/multilingual-e5-small

A setting is a configuration with a tower, a batch, a micro-batch, a precision and a method. Every setting is measured
in its own process: the real training loop on generated batches, with random weights. The time of a step is CPU time of
one thread, the median of the rounds; the memory is the peak of the process above its memory before the model. The
prices of the machine are fitted to the three settings alone, and the predictions are printed before the others run.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from typing import NamedTuple

from ratios import hardware, run_worker
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from koclip.config import PlanConfig
from koclip.planning.plan import plan, work_of
from koclip.planning.speed import Measured, Work, fit

TOKENS = 24  # of a caption


class Setting(NamedTuple):
    """A configuration, and keys that override it."""

    config: str
    keys: str = ""

    @property
    def name(self) -> str:
        """The configuration and the keys without their sections."""
        words = [word.rpartition(".")[2] for word in self.keys.split()]
        return " ".join([self.config, *words])


FITTED = (
    Setting("pretrain/scenes"),
    Setting("align/real_frozen", "--train.batch_size 32"),
    Setting("pretrain/scenes", "--model.preset small --train.batch_size 32 --train.precision bf16"),
)
PREDICTED = (
    Setting("pretrain/scenes", "--train.batch_size 256"),
    Setting("pretrain/scenes", "--train.batch_size 256 --train.micro_batch_size 32"),
    Setting("pretrain/scenes", "--train.precision bf16"),
    Setting("pretrain/scenes", "--model.preset small --train.batch_size 64"),
    Setting("pretrain/scenes", "--model.preset small --train.batch_size 128 --train.micro_batch_size 32"),
    Setting("pretrain/scenes", "--model.preset vit_b32 --train.batch_size 8"),
    Setting("pretrain/scenes", "--model.preset vit_b16 --train.batch_size 4"),
    Setting("pretrain/scenes", "--model.preset rn50 --train.batch_size 8"),
    Setting("pretrain/flickr8k_ko_small"),
    Setting("pretrain/flickr8k_ko_small", "--train.micro_batch_size 64"),
    Setting("pretrain/emoji_small"),
    Setting("align/real_projection", "--train.batch_size 512"),
    Setting("align/real_frozen", "--train.batch_size 64 --train.micro_batch_size 16"),
    Setting("align/real_frozen", "--train.batch_size 16 --train.precision bf16"),
    Setting("align/real_lora", "--train.batch_size 16"),
    Setting("align/real_unfreeze", "--train.batch_size 32"),
    Setting("align/real_frozen", "--train.batch_size 16 --align.method full"),
)


def worker(setting: Setting, options: argparse.Namespace) -> None:
    """Measure the last stage of a setting in this process, and print the result as JSON."""
    config = plan_config(setting, options, options.steps)
    measured = plan(config, config.read_run())["stages"][-1]["measured"]
    print(json.dumps(measured))


def plan_config(setting: Setting, options: argparse.Namespace, steps: int) -> PlanConfig:
    """Return the configuration of a setting's plan. Without steps, nothing is measured."""
    words = [*setting.keys.split(), "--train.num_threads", "1"]
    if setting.config.startswith("align/"):
        words += ["--model.clip", options.clip, "--model.text_encoder", options.text_encoder]
    return PlanConfig(run=setting.config, overrides=words, tokens=TOKENS, steps=steps)


def count(setting: Setting, options: argparse.Namespace) -> Work:
    """Return what a step of a setting does."""
    config = plan_config(setting, options, 0)
    run = config.read_run()
    return work_of(run, plan(config, run)["stages"][-1])


def measure(settings: Sequence[Setting], args: Sequence[str], rounds: int) -> list[tuple[float, float]]:
    """Return CPU seconds a step and peak bytes of each setting."""
    results: list[list[dict[str, float]]] = [[] for _ in settings]
    for _ in range(rounds):
        for setting, result in zip(tqdm(settings, "settings"), results, strict=True):
            number = (*FITTED, *PREDICTED).index(setting)
            result.append(run_worker(__file__, [*args, "--worker", str(number)], setting.name))
    return [
        (
            statistics.median(each["cpu_seconds"] for each in result),
            2**30 * statistics.median(each["memory_gib"] for each in result),
        )
        for result in results
    ]


def main(args: Sequence[str] | None = None) -> None:
    """Fit, predict, measure, and print the table."""
    args = sys.argv[1:] if args is None else args
    options = parser().parse_args(args)
    if options.worker is not None:
        worker((*FITTED, *PREDICTED)[options.worker], options)
        return
    works = [count(setting, options) for setting in tqdm((*FITTED, *PREDICTED), "plans")]
    fitted = measure(FITTED, args, options.rounds)
    speed = fit([Measured(s.name, work, *result) for s, work, result in zip(FITTED, works[:3], fitted, strict=True)])
    predicted = [(speed.seconds(work), speed.peak(work)) for work in works]
    prices = ", ".join(f"{name} {price:.3g} s" for name, price in speed.prices.items())
    print(
        f"{hardware()}; prices: {prices}; memory: {speed.memory[0] / 2**20:.0f} MiB + {speed.memory[1]:.2f} x counted"
    )
    for setting, (seconds, peak) in zip(PREDICTED, predicted[3:], strict=True):
        print(f"predicted: {setting.name}: {seconds:.3f} s, {peak / 2**20:.0f} MiB")
    results = [*fitted, *measure(PREDICTED, args, options.rounds)]
    show(predicted, results)


def show(predicted: Sequence[tuple[float, float]], results: Sequence[tuple[float, float]]) -> None:
    """Print the table, and the errors of the settings that were not fitted."""
    table = Table("setting", "s a step", "predicted", "error", "MiB", "predicted", "error")
    errors: list[tuple[float, float]] = []
    for setting, expected, result in zip((*FITTED, *PREDICTED), predicted, results, strict=True):
        seconds, peak = (value / real - 1 for value, real in zip(expected, result, strict=True))
        errors.append((abs(seconds), abs(peak)))
        table.add_row(
            setting.name + (" (fitted)" if setting in FITTED else ""),
            *(f"{result[0]:.3f}", f"{expected[0]:.3f}", f"{seconds:+.0%}"),
            *(f"{result[1] / 2**20:.0f}", f"{expected[1] / 2**20:.0f}", f"{peak:+.0%}"),
        )
    Console(width=150).print(table)
    for name, values in zip(("time", "memory"), zip(*errors[len(FITTED) :], strict=True), strict=True):
        print(f"{name}: median error {statistics.median(values):.1%}, worst {max(values):.1%}")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--clip", default="timm/tf_efficientnet_lite0.in1k", help="Hub id or directory (%(default)s)")
    cli.add_argument("--text_encoder", default="intfloat/multilingual-e5-small", help="the same (%(default)s)")
    cli.add_argument("--steps", type=int, default=5, help="measured steps of a process (default: %(default)s)")
    cli.add_argument("--rounds", type=int, default=3, help="processes per setting (default: %(default)s)")
    cli.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return cli


if __name__ == "__main__":
    main()
