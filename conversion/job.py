"""What a conversion works on, carried through it as one thing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from .architectures import Architecture
from .checkpoint import TensorSource


@dataclass(frozen=True)
class ConversionJob:
    """
    Attributes:
        architecture (`Architecture`): Of the source; has its config.
        tensors (`TensorSource`): The source's checkpoint.
        blocks (`torch.Tensor`, *optional*): Token ids of the calibration text, [blocks, T]; None if the preset has no
            use for text.
        device (`str`): Where layers live while it is their turn.
        seed (`int`): Of whatever is drawn at random.
        scratch (`Path`): A folder that lives as long as the conversion.
        engine (`str`, *optional*): Title of the inference engine that the model must suit.
        expressible (`Callable`): Whether that engine, or else any that runs DeepSeek's models, has a rotary table of
            some of the source's frequencies, which are given by their indices.
    """

    architecture: Architecture
    tensors: TensorSource
    blocks: torch.Tensor | None
    device: str
    seed: int
    scratch: Path
    engine: str | None = None
    expressible: Callable[[Sequence[int]], bool] = lambda frequencies: True

    @property
    def config(self) -> PreTrainedConfig:
        """The source's config."""
        return self.architecture.config
