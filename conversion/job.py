"""What a conversion works on, carried through it as one thing."""

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
    """

    architecture: Architecture
    tensors: TensorSource
    blocks: torch.Tensor | None
    device: str
    seed: int
    scratch: Path

    @property
    def config(self) -> PreTrainedConfig:
        """The source's config."""
        return self.architecture.config
