"""Every setting of koclip, in frozen dataclasses, and the parser that fills them.

A recipe's configuration is a dataclass that lists the sections it uses. `parse()` builds it from `--config FILE.yaml`
and `--section.key value` overrides. A mistake ends the program with one line on stderr.
"""

from koclip.config.adaptation import AdaptConfig
from koclip.config.alignment import METHODS, AlignMethodConfig, DistillConfig, Stage
from koclip.config.checks import (
    ConfigError,
    RunError,
    Stopped,
    all_faults,
    check,
    check_changes,
    check_data,
    check_languages,
    check_pixels,
    locate,
    peer,
)
from koclip.config.curation import (
    BalanceRules,
    CaptionRules,
    CardRules,
    CurateConfig,
    DuplicateRules,
    OverlapRules,
    PairRules,
    PictureRules,
    ReportRules,
)
from koclip.config.data import DataConfig, SourceConfig, TokenizerConfig
from koclip.config.evaluation import EvalConfig, EvalSetConfig, RatingsConfig
from koclip.config.parsing import dump, parse, run, to_dict
from koclip.config.planning import PlanConfig
from koclip.config.publishing import PublishConfig
from koclip.config.recipes import (
    AlignConfig,
    DataSetConfig,
    EvaluateConfig,
    PretrainConfig,
    TrimConfig,
)
from koclip.config.search import IndexConfig
from koclip.config.training import AdapterConfig, LossConfig, ModelConfig, OptimConfig, SwapConfig, TrainConfig

__all__ = [
    "METHODS",
    "AdaptConfig",
    "AdapterConfig",
    "AlignConfig",
    "AlignMethodConfig",
    "BalanceRules",
    "CaptionRules",
    "CardRules",
    "ConfigError",
    "CurateConfig",
    "DataConfig",
    "DataSetConfig",
    "DistillConfig",
    "DuplicateRules",
    "EvalConfig",
    "EvalSetConfig",
    "EvaluateConfig",
    "IndexConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "OverlapRules",
    "PairRules",
    "PictureRules",
    "PlanConfig",
    "PretrainConfig",
    "PublishConfig",
    "RatingsConfig",
    "ReportRules",
    "RunError",
    "SourceConfig",
    "Stage",
    "Stopped",
    "SwapConfig",
    "TokenizerConfig",
    "TrainConfig",
    "TrimConfig",
    "all_faults",
    "check",
    "check_changes",
    "check_data",
    "check_languages",
    "check_pixels",
    "dump",
    "locate",
    "parse",
    "peer",
    "run",
    "to_dict",
]
