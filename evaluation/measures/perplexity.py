"""Perplexity, of blocks of tokens and of whole texts; every token of a text is predicted exactly once."""

from collections.abc import Iterator, Sequence

import torch
from huggingface_hub.utils import tqdm
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mha2mla.common.perplexity import Perplexity
from mha2mla.evaluation.caches import DYNAMIC, CacheKind
from mha2mla.evaluation.longrope import crosses, tables_mixed
from mha2mla.modeling import CACHE_ARGUMENT

from .scoring import check_finite, inference, prefix_token, score_targets

# Tokens that go through a model at a time where only the losses are kept: its logits are the largest tensor there is.
CHUNK = 512


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
        losses.append(nn.functional.cross_entropy(logits, block[1:]).double().item())
    count = blocks.shape[1] - 1
    return Perplexity.from_sums([loss * count for loss in losses], [count] * len(losses))


def text_windows(num_tokens: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """
    Windows over a text of which tokens 1 to num_tokens - 1 are to be predicted (token 0 is the prefix).

    A window (begin, end, first) puts tokens begin to end - 1 into the model and predicts tokens first to end; it never
    has more than `length` tokens in the model. The first window predicts `length` tokens, each further one `stride`
    (or what is left), with as much context before them as fits.
    """
    first, end = 1, min(length, num_tokens - 1)
    while first < num_tokens:
        yield max(0, end - length), end, first
        first, end = end + 1, min(end + stride, num_tokens - 1)


def measure_text_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    length: int,
    stride: int | None = None,
    cache_kind: CacheKind = DYNAMIC,
) -> Perplexity:
    """
    Perplexity of whole texts, each on its own behind the tokenizer's bos (or eos) token. Every token of every text is
    predicted exactly once, so that bits per byte are exact. Standard errors are over windows.

    Args:
        length (`int`): Tokens in the model at a time.
        stride (`int`, *optional*): Tokens predicted by each window behind the first: a small stride gives every token
            a long context and costs more. Defaults to `length`: blocks, as in lm-evaluation-harness.
        cache_kind (`CacheKind`): If quantised, a window is read through it piece by piece, as decoding would.

    Raises:
        ValueError: If length or stride are out of range, there is no text, or a log-likelihood is not finite.
    """
    limit = model.config.max_position_embeddings
    stride = length if stride is None else stride
    if not 1 <= length <= limit:
        raise ValueError(f"The window must have 1 to {limit} tokens (the model's context), got {length}.")
    if not 1 <= stride <= length:
        raise ValueError(f"The stride must be 1 to {length} tokens (the window), got {stride}.")
    check_texts(texts)
    sums, counts = [], []
    with inference(model):
        for number, text in enumerate(tqdm(texts, desc="Perplexity", unit="text"), 1):
            ids = text_tokens(tokenizer, text).to(model.device)
            for begin, end, first in text_windows(len(ids), length, stride):
                keep = end + 1 - first
                if cache_kind.nbits is None:
                    logits = model(ids[None, begin:end], use_cache=False, logits_to_keep=keep).logits[0]
                else:
                    pieces = chunked_logits(model, ids[begin:end], cache_kind.piece(CHUNK), cache_kind)
                    logits = torch.cat(list(pieces))[-keep:]
                log_likelihoods, _ = score_targets(logits, ids[first : end + 1])
                check_finite(log_likelihoods, f"Text {number}: the log-likelihoods")
                sums.append(-log_likelihoods.double().sum().item())
                counts.append(keep)
    if not counts:
        raise ValueError("There is no text to measure on.")
    return Perplexity.from_sums(sums, counts, sum(len(text.encode()) for text in texts))


def check_texts(texts: Sequence[str]) -> None:
    """Raise a `ValueError` if there is one text where several are asked for: each of its characters would be one."""
    if isinstance(texts, str):
        raise ValueError(f"Texts are a list of strings, got one string ({texts[:20]!r} ...). Give [text].")


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """The prefix token and the text's own, [1 + tokens]."""
    return torch.tensor([prefix_token(tokenizer), *tokenizer.encode(text, add_special_tokens=False)])


def chunked_logits(
    model: PreTrainedModel, ids: torch.Tensor, chunk: int = CHUNK, cache_kind: CacheKind = DYNAMIC
) -> Iterator[torch.Tensor]:
    """
    Logits of a text, a chunk at a time over a growing cache, so that memory never holds those of the whole text, but
    where it outgrows longrope's first table: then one pass reads it.

    Args:
        ids (`torch.Tensor`): Token ids, [tokens].
        chunk (`int`): Tokens of a chunk.

    Yields:
        fp32 logits [<= chunk, V] of the next chunk's tokens.

    Raises:
        ValueError: If one pass must read it, and the cache takes pieces.
    """
    size = chunk
    if crosses(model.config, 0, len(ids)):
        if cache_kind.has_window:
            raise tables_mixed("A text", model.config, len(ids), cache_kind, "Lower the length to that")
        size = len(ids)
    cache = cache_kind.make(model)
    for part in ids.to(model.device).split(size):
        for logits in model(part[None], **{CACHE_ARGUMENT: cache}).logits[0].split(chunk):
            yield logits.float()


def token_losses(
    model: PreTrainedModel, ids: torch.Tensor, chunk: int = CHUNK, cache_kind: CacheKind = DYNAMIC
) -> torch.Tensor:
    """Loss in nats of each token but the first given those before it, [tokens - 1], fp32."""
    targets = ids[1:].to(model.device)
    losses = []
    chunk = cache_kind.piece(chunk)
    with inference(model):
        chunks = chunked_logits(model, ids[:-1], chunk, cache_kind)
        for logits, target in zip(chunks, targets.split(chunk), strict=True):
            losses.append(-score_targets(logits, target)[0])
    return torch.cat(losses)
