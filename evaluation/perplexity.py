"""Perplexity over blocks of tokens."""

import math
from dataclasses import dataclass

import torch
from huggingface_hub.utils import tqdm
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Perplexity:
    """
    Attributes:
        loss (`float`): Mean cross-entropy per predicted token, in nats.
        loss_stderr (`float`): Standard error of the loss over blocks (tokens of a block are not independent).
        num_tokens (`int`): Predicted tokens.
    """

    loss: float
    loss_stderr: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def stderr(self) -> float:
        """Standard error of the perplexity, to first order."""
        return self.perplexity * self.loss_stderr

    def __str__(self) -> str:
        return f"{self.perplexity:.2f} ± {self.stderr:.2f}"


@torch.no_grad()
def measure_perplexity(model: PreTrainedModel, blocks: torch.Tensor) -> Perplexity:
    """
    Perplexity of each block's tokens given those before them in the block.

    Args:
        model (`PreTrainedModel`): A causal language model.
        blocks (`torch.Tensor`): Token ids, [blocks, tokens]; the first token of a block is not predicted.
    """
    losses = []
    for block in tqdm(blocks.to(model.device), desc="Perplexity", unit="block"):
        logits = model(block[None], use_cache=False).logits[0, :-1].float()
        losses.append(nn.functional.cross_entropy(logits, block[1:]))
    per_block = torch.stack(losses).double()
    stderr = per_block.std().item() / math.sqrt(len(per_block)) if len(per_block) > 1 else math.nan
    return Perplexity(per_block.mean().item(), stderr, blocks[:, 1:].numel())
