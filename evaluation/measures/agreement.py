"""How closely a converted model follows the original: greedy continuations and the distributions of next tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mha2mla.evaluation.caches import DYNAMIC, CacheKind

from .greedy import generate_greedily
from .multiple_choice import mean_stderr
from .perplexity import CHUNK, check_texts, chunked_logits, text_tokens
from .scoring import check_finite, inference


@dataclass(frozen=True)
class Agreement:
    """
    Attributes:
        kl (`float`): Mean over tokens of KL(original || model), in nats.
        kl_stderr (`float`): Its standard error over texts.
        top1 (`float`): Share of tokens for which both find the same next token likeliest.
        matched_tokens (`float`): Mean number of greedy tokens before the first that differs from the original's.
        matched_stderr (`float`): Its standard error over texts.
        identical (`float`): Share of texts whose greedy continuations are the same to the end.
        num_tokens, num_texts (`int`): What was measured.
    """

    kl: float
    kl_stderr: float
    top1: float
    matched_tokens: float
    matched_stderr: float
    identical: float
    num_tokens: int
    num_texts: int


def kl_divergence(
    original: PreTrainedModel,
    model: PreTrainedModel,
    ids: torch.Tensor,
    chunk: int = CHUNK,
    cache_kind: CacheKind = DYNAMIC,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Compare the next-token distributions behind every token of a text, a chunk at a time.

    Args:
        ids (`torch.Tensor`): Token ids, [tokens].

    Returns:
        KL(original || model) in nats and whether the likeliest tokens are the same, both [tokens], on the CPU.
    """
    divergences, same = [], []
    chunk = cache_kind.piece(chunk)
    pairs = zip(chunked_logits(original, ids, chunk), chunked_logits(model, ids, chunk, cache_kind), strict=True)
    for reference, logits in pairs:
        p = reference.log_softmax(-1)
        q = logits.to(p.device).log_softmax(-1)
        divergences.append((p.exp() * (p - q)).sum(-1).cpu())
        same.append((p.argmax(-1) == q.argmax(-1)).cpu())
    return torch.cat(divergences), torch.cat(same)


def greedy_continuation(
    model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, cache_kind: CacheKind = DYNAMIC
) -> list[int]:
    """Greedy tokens behind a prompt [tokens], up to and with an end-of-sequence token."""
    prompt = ids[None]
    return generate_greedily(model, prompt, torch.ones_like(prompt), new_tokens, cache_kind)[0].tolist()


def matching_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading tokens are the same."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def measure_agreement(
    original: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    length: int = 512,
    prompt_length: int = 64,
    new_tokens: int = 64,
    cache_kind: CacheKind = DYNAMIC,
) -> Agreement:
    """
    Agreement with the original on texts: the KL divergence over the first tokens of each text, and greedy
    continuations of its beginning.

    Args:
        original, model (`PreTrainedModel`): Two causal language models of one vocabulary.
        length (`int`, *optional*, defaults to 512): Tokens of each text for the KL divergence.
        prompt_length (`int`, *optional*, defaults to 64): Tokens of each text that are continued.
        new_tokens (`int`, *optional*, defaults to 64): Greedy tokens at most.
        cache_kind (`CacheKind`): Of the model; the original's is plain.

    Raises:
        ValueError: If the vocabularies differ, the models' context is too short, there is no text, or a divergence is
            not finite.
    """
    check_texts(texts)
    if original.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"The models' vocabularies have {original.config.vocab_size} and {model.config.vocab_size} tokens: only "
            "a model and its own conversion can be compared."
        )
    limit = min(original.config.max_position_embeddings, model.config.max_position_embeddings)
    needed = max(length, prompt_length + new_tokens)
    if needed > limit:
        raise ValueError(f"The comparison needs {needed} tokens, the model takes {limit}. Lower the length.")
    if not texts:
        raise ValueError("There is no text to measure on.")
    divergences, same, matched, identical = [], [], [], []
    with inference(original), inference(model):
        for number, text in enumerate(tqdm(texts, desc="Agreement", unit="text"), 1):
            ids = text_tokens(tokenizer, text)[:length]
            divergence, equal = kl_divergence(original, model, ids, cache_kind=cache_kind)
            check_finite(divergence, f"Text {number}: the divergences")
            divergences.append(divergence)
            same.append(equal)
            prompt = ids[:prompt_length]
            expected = greedy_continuation(original, prompt, new_tokens)
            written = greedy_continuation(model, prompt, new_tokens, cache_kind)
            matched.append(float(matching_prefix(expected, written)))
            identical.append(float(expected == written))
    all_divergences = torch.cat(divergences)
    return Agreement(
        all_divergences.mean().item(),
        mean_stderr([d.mean().item() for d in divergences]),
        torch.cat(same).float().mean().item(),
        mean(matched),
        mean_stderr(matched),
        mean(identical),
        len(all_divergences),
        len(texts),
    )
