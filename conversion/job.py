"""What a conversion works on, carried through it as one thing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
        digest (`Callable`): Gives what tells the source's weights from others, see [`CheckpointReader.digest`].
        engine (`str`, *optional*): Title of the inference engine that the model must suit.
        expressible (`Callable`): Whether that engine, or else any that runs DeepSeek's models, has a rotary table of
            some of the source's frequencies, which are given by their indices.
        held_out (`torch.Tensor`, *optional*): Token ids of text of the same kind that nothing is fitted to,
            [blocks, T].
        losses (`dict[str, float]`): Of the "source" and of the "converted" model on that text, mean cross-entropy per
            token in nats; left here by a preset that carries text through both.
    """

    architecture: Architecture
    tensors: TensorSource
    blocks: torch.Tensor | None
    device: str
    seed: int
    scratch: Path
    digest: Callable[[], str] = str
    engine: str | None = None
    expressible: Callable[[Sequence[int]], bool] = lambda frequencies: True
    held_out: torch.Tensor | None = None
    losses: dict[str, float] = field(default_factory=dict)

    @property
    def config(self) -> PreTrainedConfig:
        """The source's config."""
        return self.architecture.config
