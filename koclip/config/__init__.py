"""Every knob of koclip, once: frozen dataclasses, one per room, and the parser that fills them.

A recipe's configuration is the dataclass that lists the sections it uses. `parse()` builds it from
`--config FILE.yaml` and `--section.key value` overrides, and stops with one clear line on any mistake.
"""

from koclip.config.alignment import AdapterConfig, AlignMethodConfig, DistillConfig, SwapConfig
from koclip.config.changes import check_changes, check_data
from koclip.config.data import DataConfig, SourceConfig, TokenizerConfig
from koclip.config.errors import ConfigError, RunError, check, check_pixels
from koclip.config.evaluation import EvalConfig, EvalSetConfig, RatingsConfig
from koclip.config.languages import check_languages
from koclip.config.model import LossConfig, ModelConfig
from koclip.config.parsing import dump, parse, run, to_dict
from koclip.config.paths import locate
from koclip.config.recipes import AlignConfig, PretrainConfig, Stage
from koclip.config.tools import EvaluateConfig, IndexConfig, PublishConfig
from koclip.config.training import OptimConfig, TrainConfig

__all__ = [
    "AdapterConfig",
    "AlignConfig",
    "AlignMethodConfig",
    "ConfigError",
    "DataConfig",
    "DistillConfig",
    "EvalConfig",
    "EvalSetConfig",
    "EvaluateConfig",
    "IndexConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "PretrainConfig",
    "PublishConfig",
    "RatingsConfig",
    "RunError",
    "SourceConfig",
    "Stage",
    "SwapConfig",
    "TokenizerConfig",
    "TrainConfig",
    "check",
    "check_changes",
    "check_data",
    "check_languages",
    "check_pixels",
    "dump",
    "locate",
    "parse",
    "run",
    "to_dict",
]
