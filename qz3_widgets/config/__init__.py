"""What the user wants: the schema of a run, presets, and YAML in and out."""

from .io import (
    ConfigError,
    Problem,
    apply_overrides,
    changed_fields,
    diff,
    dump_config,
    from_plain,
    get_field,
    load_config,
    loads_config,
    save_config,
    with_changes,
)
from .paths import default_cache_dir
from .presets import PRESET_GPUS, PRESETS, MeantFor, preset, preset_description
from .schema import (
    SECTIONS,
    DataSection,
    LaunchSection,
    LoraSection,
    ModelSection,
    QuantizationSection,
    RunConfig,
    TrainingSection,
    ZeroSection,
    field_paths,
)
from .shapes import shape_file, shape_names

__all__ = [
    "PRESETS",
    "PRESET_GPUS",
    "SECTIONS",
    "ConfigError",
    "DataSection",
    "LaunchSection",
    "LoraSection",
    "MeantFor",
    "ModelSection",
    "Problem",
    "QuantizationSection",
    "RunConfig",
    "TrainingSection",
    "ZeroSection",
    "apply_overrides",
    "changed_fields",
    "default_cache_dir",
    "diff",
    "dump_config",
    "field_paths",
    "from_plain",
    "get_field",
    "load_config",
    "loads_config",
    "preset",
    "preset_description",
    "save_config",
    "shape_file",
    "shape_names",
    "with_changes",
]
