"""What the user chooses: size of the cache, calibration text, output, and a preset with options of its own."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import wraps
from typing import Any, Literal

from mha2mla.common.kernel_sizes import ENGINES
from mha2mla.common.options import SEEDS, check_between, check_choices, check_least, settle_types, shard_bytes

from .cache_sizes import CacheSizes
from .presets import Preset, preset_classes
from .presets.calibrated import Calibrated

CALIBRATION_TOKENS = 2**16


@dataclass(kw_only=True)
class CalibrationText:
    """Text on which a preset measures the source."""

    _argument_group_name = "calibration text"

    data: str | None = field(
        default=None,
        metadata={
            "help": "Calibration text: a recipe (its name, or a .yaml file: a mixture with weights), OWNER/NAME of a "
            "data set on the Hub, or .txt, .jsonl, .json or .parquet files, compressed or not; patterns name several."
        },
    )
    subset: str | None = field(default=None, metadata={"help": "Configuration of the data set, if any."})
    split: str = field(default="train", metadata={"help": "Split of a data set from the Hub."})
    column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the text, or of the messages of a chat; by default text, or messages where there is no "
            "text. A recipe has its own."
        },
    )
    samples: int | None = field(
        default=None,
        metadata={"help": f"Blocks of calibration text; by default {CALIBRATION_TOKENS:,} tokens of them."},
    )
    length: int | None = field(
        default=None,
        metadata={"help": "Tokens of a block; by default 2,048, or 1,024 on a CPU, where long contexts take longer."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the choice of calibration text."})


@dataclass(kw_only=True)
class ServingOptions:
    """Where the model is to be served."""

    _argument_group_name = "serving"

    serve: str | None = field(
        default=None,
        metadata={
            "choices": tuple(ENGINES),
            "help": "Inference engine that an export must suit: sizes not given are those of its kernels, and what it "
            "cannot run is refused before the work.",
        },
    )


@dataclass(kw_only=True)
class OutputOptions:
    """Where the work is done, and what is written."""

    _argument_group_name = "output"

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = field(
        default="auto", metadata={"help": "Type of the weights written; auto: the source's."}
    )
    device: str = field(default="cpu", metadata={"help": "Where calibration and decompositions run: cpu or cuda."})
    max_shard_size: str = field(default="2GB", metadata={"help": "Largest weights file; bounds the memory needed."})
    overwrite: bool = field(default=False, metadata={"help": "Replace OUTPUT if an earlier conversion made it."})


def presets_with(option: str) -> list[type[Preset]]:
    """The presets that have an option of this name."""
    return [preset for preset in preset_classes().values() if option in {f.name for f in fields(preset)}]


def refuse_foreign_options(names: Iterable[str], chosen: str) -> None:
    """Raise a `ValueError` if one of the names is an option that only another preset than the chosen one has."""
    for name in names:
        owners = [preset.name for preset in presets_with(name)]
        if owners and chosen not in owners:
            raise ValueError(
                f"{name} is an option of the preset {owners[0]!r}, and {chosen!r} is chosen. Leave it out, or add "
                f"--preset {owners[0]}."
            )


def refuses_options_of_presets(config: type[Any]) -> type[Any]:
    """A config whose constructor says where an option of a preset belongs, which the command line takes beside all
    others. Without this it would say that there is no such argument."""
    make = config.__init__  # type: ignore[misc]

    @wraps(make)
    def __init__(self, *args: Any, **values: Any) -> None:
        for name in values:
            for owner in presets_with(name)[:1]:
                own = {f.name for f in fields(owner)} & values.keys()
                given = ", ".join(f"{each}={value!r}" for each, value in values.items() if each in own)
                raise ValueError(
                    f"{name}={values[name]!r} is an option of the preset {owner.name!r}: give "
                    f"preset={owner.__name__}({given})."
                )
        make(self, *args, **values)

    config.__init__ = __init__  # type: ignore[misc]
    return config


@refuses_options_of_presets
@dataclass(kw_only=True)
class ConversionConfig(CacheSizes, ServingOptions, CalibrationText, OutputOptions):
    """
    Options of a conversion.

    Args:
        preset (`Preset`, *optional*, defaults to `Calibrated()`): How the MLA weights are made, with its own options.
        cache_ratio (`float`, *optional*): Size of the new cache over the old one; or give `kv_lora_rank` (`int`) and
            `qk_rope_head_dim` (`int`), or, for their sizes, the engine to `serve` with (`str`).

    The other fields are those of [`CalibrationText`] and [`OutputOptions`].

    Raises:
        ValueError: If options contradict each other.

    Example:

    ```python
    >>> ConversionConfig(preset=Calibrated(refine_steps=640), cache_ratio=0.3125, data="texts.jsonl")
    >>> ConversionConfig(preset=Paper(svd="split", rope_selection="uniform"), cache_ratio=0.3125)
    ```
    """

    preset: Preset = field(default_factory=Calibrated)

    def __post_init__(self):
        settle_types(self)
        super().__post_init__()
        if re.fullmatch(r"cpu:\d+", self.device):
            self.device = "cpu"  # which has defaults of its own
        if not isinstance(self.preset, Preset):
            names = ", ".join(f"{preset.__name__}()" for preset in preset_classes().values())
            raise ValueError(f"preset={self.preset!r} must be an object with the preset's options: {names}.")
        check_choices(self)
        self.preset = self.preset.on_device(self.device)
        if self.length is None:
            self.length = 1024 if self.device == "cpu" else 2048
        if self.samples is None:
            self.samples = max(1, CALIBRATION_TOKENS // self.length)
        check_least(self, samples=1, length=2)
        check_between(self, seed=SEEDS)
        shard_bytes(self.max_shard_size)
        if self.preset.use_of_text is not None and self.data is None:
            raise ValueError(f"{self.preset.use_of_text}: give --data (a data set's name or a text file).")

    def to_dict(self) -> dict[str, Any]:
        """All options in one flat dict, the preset by its name: what the record of a conversion holds."""
        common = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "preset"}
        return {"preset": self.preset.name, **asdict(self.preset), **common}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ConversionConfig":
        """
        From names and values as the command line and [`to_dict`] have them. What is missing has its default.

        Raises:
            ValueError: For an unknown preset, or an option that is not one of the preset's.
        """
        presets = preset_classes()
        values = dict(values)
        chosen = values.pop("preset", Calibrated.name)
        if chosen not in presets:
            raise ValueError(f"preset={chosen!r} must be one of {', '.join(presets)}.")
        options = {f.name for f in fields(presets[chosen])}
        refuse_foreign_options(values, chosen)
        own = {name: values.pop(name) for name in options & values.keys()}
        for name in values.keys() - {f.name for f in fields(cls)}:
            raise ValueError(f"There is no option {name!r}.")
        return cls(preset=presets[chosen](**own), **values)
