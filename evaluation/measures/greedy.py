"""Greedy decoding by the model alone, whatever its checkpoint says of generation."""

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from mha2mla.evaluation.caches import DYNAMIC, CacheKind

from .scoring import NOT_FINITE

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class RefuseNan(LogitsProcessor):
    """Of logits that are NaN an argmax exists, and means nothing."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Token ids [batch, tokens] and logits [batch, V]; gives these back."""
        if scores.isnan().any():
            raise ValueError(f"The logits of a continuation {NOT_FINITE}")
        return scores


def generate_greedily(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    new_tokens: int,
    cache_kind: CacheKind = DYNAMIC,
    pad: int | None = None,
) -> torch.Tensor:
    """
    The likeliest tokens behind prompts, one after another, up to an end-of-sequence token.

    `generate` fills whatever a given configuration leaves open from the model's own (`repetition_penalty`,
    `num_beams`, `min_new_tokens`, ...), so that for the time being the model has one that says nothing but which
    tokens are special.

    Args:
        ids, mask (`torch.Tensor`): Token ids and which of them are no padding, both [batch, tokens].
        new_tokens (`int`): Tokens at most.
        cache_kind (`CacheKind`): In what cache the continuation finds the prompt.
        pad (`int`, *optional*): What stands behind a continuation that has ended; the model's own if not given.

    Returns:
        The new tokens, [batch, <= new_tokens], on the model's device.
    """
    own = model.generation_config
    special = {name: getattr(own, name) for name in SPECIAL_TOKENS} | ({} if pad is None else {"pad_token_id": pad})
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, **special)
    try:
        output = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            logits_processor=[RefuseNan()],
            **cache_kind.generate_arguments(model.config),
        )
    finally:
        model.generation_config = own
    return output[:, ids.shape[1] :]
