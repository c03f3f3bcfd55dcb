"""Configuration of `koclip plan`, and the configuration of the run that it plans."""

from dataclasses import dataclass, field
from pathlib import Path

import yaml

from koclip import installation
from koclip.config.checks import ConfigError, all_faults, check, check_least
from koclip.config.parsing import parse
from koclip.config.recipes import AlignConfig, PretrainConfig

_ALIGN_ONLY = {"align", "distill", "lora"}  # sections that `koclip pretrain` does not have


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Say what a training run will take, before it starts: parameters, FLOPs, memory, disk, time and price.

    Args:
        run: Configuration of `koclip pretrain` or `koclip align`: a file, or a name that `koclip ls` lists. May be the
            first word: `koclip plan align/real_projection`. Keys of its sections may follow, and override it:
            `--train.batch_size 512`.
        overrides: The same keys as a list of words: `[--train.batch_size, "512"]`.
        tokens: Tokens per caption, with padding. Default: tokenizer.max_tokens, the longest caption that a run takes.
        num_images: Different images of the data, for the size of cached features on disk. Default: not computed.
        num_captions: Different captions of the data, likewise.
        num_devices: Devices that share the batches: each takes train.batch_size pairs per step.
        sharded: Shard weights, gradients and moments over the devices (FSDP2).
        memory_gib: Memory of a device, GiB: the largest micro-batch that fits is computed. Default: that of `device`.
        device: Device of koclip's table: `v100`, `a100`, `h100`, `h200` or `l4`. Gives peak FLOPs, memory and watts.
        utilization: Share of the device's peak FLOPs that training reaches. Not measured: a number that you state.
        steps: Measure this many training steps on this machine, on generated batches. The model gets random weights.
            Then hours follow from the measured speed instead of `device`. 0: no measurement.
        machine: JSON file of a machine. With `steps`, the measured steps are added to it. Without, the speed and the
            peak memory of this run are predicted from what the file has. Three different runs are enough.
        watts: Power of a device, W. Default: that of `device`.
        price_per_hour: Price of a device for an hour, in any currency.
        output_file: JSON file of the plan. Default: none.
    """

    run: str = ""
    overrides: list[str] = field(default_factory=list)
    tokens: int | None = None
    num_images: int | None = None
    num_captions: int | None = None
    num_devices: int = 1
    sharded: bool = False
    memory_gib: float | None = None
    device: str | None = None
    utilization: float = 0.3
    steps: int = 0
    machine: str | None = None
    watts: float | None = None
    price_per_hour: float | None = None
    output_file: str | None = None

    @all_faults()
    def __post_init__(self) -> None:
        check(bool(self.run), "run", self.run, "name a configuration: koclip plan align/scenes")
        check_least(self, "", 1, "num_devices", "num_images", "num_captions")
        check_least(self, "", 3, "tokens")
        check_least(self, "", 0, "steps", "watts", "price_per_hour")
        check(0 < self.utilization <= 1, "utilization", self.utilization, "expected more than 0, at most 1")
        memory = self.memory_gib
        check(memory is None or memory > 0, "memory_gib", memory, "expected more than 0")
        fix = "expected 2 or more devices to shard over: --num_devices 8"
        check(not self.sharded or self.num_devices > 1, "num_devices", self.num_devices, fix)

    def read_run(self) -> PretrainConfig | AlignConfig:
        """Return the configuration of the planned run. A mistake in it prints a line and exits with code 2.

        Raises:
            ConfigError: there is no such configuration, or it is of another recipe.
        """
        path = Path(self.run)
        is_file = path.exists()
        try:
            path = path if is_file else installation.config_path(self.run)
            sections = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(
                f"run: got {self.run!r}, expected a configuration: {' '.join(str(error).split())}"
            ) from error
        sections = sections if isinstance(sections, dict) else {}
        recipe = None if is_file else path.parent.name
        model = sections.get("model") or {}
        aligns = recipe == "align" or bool(_ALIGN_ONLY & sections.keys()) or "clip" in model
        trains = recipe in ("pretrain", "align", None) and "data" in sections
        check(trains, "run", self.run, "expected a configuration of pretrain or align, with a section `data`")
        words = ["--config", str(path), *self.overrides]
        return parse(AlignConfig, words) if aligns else parse(PretrainConfig, words)
