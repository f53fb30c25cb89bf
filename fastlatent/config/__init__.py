"""Every setting of every command: frozen dataclasses, the only place where defaults live.

The command line, the YAML files and the docs are made from these. Precedence: dataclass < preset < YAML file < flags.
Plain Python, no torch: `fastlatent --help` imports this.
"""

from fastlatent.config.convert import ConvertConfig
from fastlatent.config.decode import DecodeConfig, GalleryConfig
from fastlatent.config.encode import EncodeConfig
from fastlatent.config.fields import (
    MAX_SEED,
    build,
    given,
    item_type,
    read_yaml,
    suggest,
    to_yaml,
    value_type,
)
from fastlatent.config.hub import PullConfig, PushConfig
from fastlatent.config.maintain import (
    DoctorConfig,
    FilterConfig,
    GcConfig,
    InspectConfig,
    MergeConfig,
    RepairConfig,
    SplitConfig,
    StatsConfig,
    VerifyConfig,
)
from fastlatent.config.sample import RoundtripConfig, SampleConfig
from fastlatent.config.train import (
    ExportConfig,
    LabelledTrainConfig,
    LatentTrainConfig,
    TrainArConfig,
    TrainConfig,
    TrainDdpmConfig,
    TrainDitConfig,
    TrainPixelDdpmConfig,
    TrainVaeConfig,
    UNetTrainConfig,
)

__all__ = [
    "MAX_SEED",
    "ConvertConfig",
    "DecodeConfig",
    "DoctorConfig",
    "EncodeConfig",
    "ExportConfig",
    "FilterConfig",
    "GalleryConfig",
    "GcConfig",
    "InspectConfig",
    "LabelledTrainConfig",
    "LatentTrainConfig",
    "MergeConfig",
    "PullConfig",
    "PushConfig",
    "RepairConfig",
    "RoundtripConfig",
    "SampleConfig",
    "SplitConfig",
    "StatsConfig",
    "TrainArConfig",
    "TrainConfig",
    "TrainDdpmConfig",
    "TrainDitConfig",
    "TrainPixelDdpmConfig",
    "TrainVaeConfig",
    "UNetTrainConfig",
    "VerifyConfig",
    "build",
    "given",
    "item_type",
    "read_yaml",
    "suggest",
    "to_yaml",
    "value_type",
]
