"""Log-likelihoods of continuations, the context of several continuations being read once.

Contexts and continuations become tokens as in lm-evaluation-harness, so that both tools give the same numbers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mha2mla.evaluation.caches import DYNAMIC, CacheKind
from mha2mla.evaluation.longrope import crosses, first_table, tables_mixed
from mha2mla.modeling import CACHE_ARGUMENT

NOT_FINITE = "are NaN or infinite. Try --dtype float32; if they stay so, the checkpoint is broken."


@dataclass(frozen=True)
class Request:
    """
    Attributes:
        name (`str`): Of the item, for messages.
        context (`list[int]`): Token ids; at least one.
        continuations (`list[list[int]]`): Token ids of each; at least one.
    """

    name: str
    context: list[int]
    continuations: list[list[int]]

    def num_prefill(self, cache_kind: CacheKind) -> int:
        """Tokens of the context that go through a model before any continuation. A prefill attends to itself in full
        precision, so where a cache has a window the context's last token goes with the continuations."""
        return max(1, len(self.context) - 1) if cache_kind.has_window else len(self.context)

    @property
    def num_tokens(self) -> int:
        """With the longest continuation, whose last token is only predicted."""
        return len(self.context) + max(map(len, self.continuations)) - 1

    def crosses(self, config: PreTrainedConfig, cache_kind: CacheKind) -> bool:
        """Whether a continuation outgrows longrope's first table, and its context alone does not."""
        return crosses(config, self.num_prefill(cache_kind), self.num_tokens)

    def check_pieces(self, config: PreTrainedConfig, cache_kind: CacheKind, what: str) -> None:
        """Raise a `ValueError` if it does, and the cache takes continuations in pieces."""
        if cache_kind.has_window and self.crosses(config, cache_kind):
            raise tables_mixed(what, config, self.num_tokens, cache_kind, "Shorten the item or leave it out")


@dataclass(frozen=True)
class Score:
    """
    Attributes:
        log_likelihood (`float`): Of the continuation after its context, in nats.
        greedy (`bool`): Whether greedy decoding would have written it.
    """

    log_likelihood: float
    greedy: bool


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """No gradients and no dropout; the model's mode is put back. In training mode gradient checkpointing would drop
    the cache without a word."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def check_finite(values: torch.Tensor, what: str) -> None:
    """Raise a `ValueError` if one of the numbers, of any shape, is NaN or infinite; `what` names them, in plural."""
    if not values.isfinite().all():
        raise ValueError(f"{what} {NOT_FINITE}")


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands before a text that has nothing before it."""
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if token is None:
        raise ValueError("The tokenizer has neither a bos_token nor an eos_token; one must stand before a text.")
    return token


def encode_request(
    tokenizer: PreTrainedTokenizerBase, name: str, context: str, continuations: list[str], max_length: int
) -> Request:
    """
    Tokens of a context and of its continuations.

    A continuation's tokens are those that context and continuation have together, less as many as the context has
    alone. White space at the end of the context counts to the continuation, since tokenizers join it to the next word.

    Args:
        max_length (`int`): Tokens that the model takes.

    Raises:
        ValueError: If it is longer than that, or a continuation adds no token.
    """
    stripped = context.rstrip()
    space = context[len(stripped) :]
    if context == "":
        prefix = [prefix_token(tokenizer)]
        encoded = [tokenizer.encode(text, add_special_tokens=False) for text in continuations]
    else:
        prefix = tokenizer.encode(stripped)
        encoded = [tokenizer.encode(stripped + space + text)[len(prefix) :] for text in continuations]
    for text, ids in zip(continuations, encoded, strict=True):
        if not ids or not prefix:
            raise ValueError(f"Item {name}: the tokenizer makes no token of {text!r} or of its context.")
        needed = len(prefix) + len(ids) - 1  # the last token is only predicted
        if needed > max_length:
            raise ValueError(
                f"Item {name}: context and continuation need {needed} tokens, the model takes {max_length}. "
                "Shorten the item or leave it out."
            )
    return Request(name, prefix, encoded)


def score_requests(
    model: PreTrainedModel, requests: list[Request], batch_size: int, desc: str, cache_kind: CacheKind = DYNAMIC
) -> list[list[Score]]:
    """
    Scores of all continuations, in the order of the requests.

    Args:
        batch_size (`int`): Contexts at a time. They are sorted by length, the longest first, so that little is padded
            and lack of memory shows at once.
        desc (`str`): Of the progress bar.
        cache_kind (`CacheKind`): How continuations find their context. One with a window is read by all their tokens,
            the first one too: the last token of a context goes through the model behind the others.

    Raises:
        ValueError: If a log-likelihood is not finite, or one pass must read a request and the cache takes pieces.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    config, selects = model.config, cache_kind.can_select(model.config)
    for request in requests:
        request.check_pieces(config, cache_kind, f"Item {request.name}")
    crossing = [r.crosses(config, cache_kind) for r in requests]
    # Where each continuation reads the context anew.
    alone = [len(r.continuations) > 1 and (not selects or c) for r, c in zip(requests, crossing, strict=True)]
    if any(alone):
        parts = [
            [Request(r.name, r.context, [ids]) for ids in r.continuations] if apart else [r]
            for r, apart in zip(requests, alone, strict=True)
        ]
        flat = iter(score_requests(model, [r for part in parts for r in part], batch_size, desc, cache_kind))
        return [[score for _ in part for score in next(flat)] for part in parts]
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].context))
    # Padding counts as tokens to a cache: beside a longer context, one within the window would be rounded. And the
    # largest position of a batch chooses the rotary table of all its rows.
    exact, table = cache_kind.exact_tokens(config), first_table(config)
    groups: dict[tuple[bool, bool, bool], list[int]] = {}
    for i in order:
        kinds = len(requests[i].context) > exact, crossing[i], requests[i].num_tokens > table
        groups.setdefault(kinds, []).append(i)
    batches = [
        (group[start : start + batch_size], whole)
        for (_, whole, _), group in groups.items()
        for start in range(0, len(group), batch_size)
    ]
    scores: dict[int, list[Score]] = {}
    with inference(model), tqdm(total=len(requests), desc=desc, unit="item") as bar:
        for batch, whole in batches:
            rows = score_batch(model, [requests[i] for i in batch], cache_kind, whole)
            scores.update(zip(batch, rows, strict=True))
            bar.update(len(batch))
    return [scores[i] for i in range(len(requests))]


def pad_contexts(contexts: Sequence[Sequence[int]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of contexts, padded on the left, and which of them are no padding, both [Q, L]."""
    lengths = torch.tensor([len(ids) for ids in contexts])
    longest = int(lengths.max())
    rows = torch.tensor([[pad] * (longest - len(ids)) + list(ids) for ids in contexts])
    return rows, (torch.arange(longest) >= longest - lengths[:, None]).long()


def score_batch(
    model: PreTrainedModel, requests: list[Request], cache_kind: CacheKind, whole: bool
) -> list[list[Score]]:
    """Score a batch: contexts go through the model once, padded; then their cache is repeated for each of their
    continuations (C in all), which go through it right-padded, in pieces as texts do where it has a window. If
    `whole`, each request has one continuation, and one pass reads both."""
    device = model.device
    lengths = torch.tensor([len(r.context) for r in requests], device=device)
    longest = int(lengths.max())
    context, context_mask = (x.to(device) for x in pad_contexts([r.context for r in requests]))  # [Q, L]
    context_positions = (context_mask.cumsum(-1) - 1).clamp(min=0)
    num_prefill = 0 if whole else max(r.num_prefill(cache_kind) for r in requests)  # P
    cache = cache_kind.make(model)
    if num_prefill > 0:
        prefill_logits = model(
            context[:, :num_prefill],
            attention_mask=context_mask[:, :num_prefill],
            position_ids=context_positions[:, :num_prefill],
            **{CACHE_ARGUMENT: cache},
            logits_to_keep=1,
        ).logits  # [Q, 1, V]

    continuations = [ids for r in requests for ids in r.continuations]
    owner = torch.tensor([q for q, r in enumerate(requests) for _ in r.continuations], device=device)  # [C]
    widest = max(map(len, continuations))
    targets = torch.tensor([ids + [0] * (widest - len(ids)) for ids in continuations], device=device)  # [C, T]
    sizes = torch.tensor([len(ids) for ids in continuations], device=device)
    target_mask = torch.arange(widest, device=device) < sizes[:, None]

    log_likelihoods, greedy = [], []
    if num_prefill == longest:
        values, best = score_targets(prefill_logits.squeeze(1)[owner], targets[:, 0])
        log_likelihoods.append(values[:, None])
        greedy.append(best[:, None])
    rest = torch.cat((context[owner, num_prefill:], targets[:, :-1]), dim=1)  # [C, L - P + T - 1]
    if rest.shape[1] > 0:
        if len(owner) > len(requests):
            cache.batch_select_indices(owner)
        steps = torch.arange(widest - 1, device=device).minimum(sizes[:, None] - 2)  # padding goes no further
        positions = torch.cat((context_positions[owner, num_prefill:], lengths[owner, None] + steps), dim=1)
        mask = torch.cat((context_mask[owner], target_mask[:, :-1].long()), dim=1)  # [C, L + T - 1]
        pieces, end = [], num_prefill
        piece = cache_kind.piece(rest.shape[1])
        for ids, places in zip(rest.split(piece, dim=1), positions.split(piece, dim=1), strict=True):
            end += ids.shape[1]
            memory = {CACHE_ARGUMENT: cache}
            inputs = dict(attention_mask=mask[:, :end], position_ids=places, logits_to_keep=widest, **memory)
            pieces.append(model(ids, **inputs).logits)
        logits = torch.cat(pieces, dim=1)  # one for each target that the prefill did not score
        values, best = score_targets(logits, targets[:, -logits.shape[1] :])
        log_likelihoods.append(values)
        greedy.append(best)
    sums = torch.cat(log_likelihoods, dim=1).masked_fill(~target_mask, 0).sum(-1)
    for request, of_request in zip(requests, sums.split([len(r.continuations) for r in requests]), strict=True):
        check_finite(of_request, f"Item {request.name}: the log-likelihoods")
    all_greedy = (torch.cat(greedy, dim=1) | ~target_mask).all(-1).tolist()
    flat = iter(map(Score, sums.tolist(), all_greedy))
    return [[next(flat) for _ in r.continuations] for r in requests]


def score_targets(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        logits (`torch.Tensor`): [..., V].
        targets (`torch.Tensor`): Token ids, [...].

    Returns:
        Log-likelihoods in fp32 and whether each target is the likeliest token, both [...].
    """
    logits = logits.float()
    chosen = logits.gather(-1, targets[..., None]).squeeze(-1)
    return chosen - logits.logsumexp(-1), logits.argmax(-1) == targets


def token_log_likelihoods(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Log-likelihood of every label given the tokens before it: the `Trainer`'s `preprocess_logits_for_metrics` for the
    metric module `metric_token_perplexity`.

    Args:
        logits (`torch.Tensor`): [batch, tokens, V].
        labels (`torch.Tensor`): [batch, tokens]; -100 where a token does not count.

    Returns:
        fp32, [batch, tokens]; 0 for the first token and for those that do not count.
    """
    targets = labels[:, 1:]
    values, _ = score_targets(logits[:, :-1], targets.clamp(min=0))
    return torch.nn.functional.pad(values.masked_fill(targets < 0, 0), (1, 0))
