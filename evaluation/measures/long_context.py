"""Long context: retrieval of a passkey by depth and length, and perplexity by position on long documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mha2mla.evaluation.caches import DYNAMIC, CacheKind

from .items import Item
from .multiple_choice import mean_stderr
from .perplexity import Perplexity, text_tokens, token_losses
from .scoring import check_finite, encode_request, score_requests

DEPTH_BINS = 5


@dataclass(frozen=True)
class Cell:
    """
    Retrieval at one length and over a range of depths.

    Attributes:
        length (`float`): As the items state it.
        depth (`float`): The middle of the range, from 0 (beginning) to 1.
        accuracy (`float`): Share of items retrieved.
        num_items (`int`): In this cell.
    """

    length: float
    depth: float
    accuracy: float
    num_items: int


@dataclass(frozen=True)
class Retrieval:
    """
    Attributes:
        accuracy (`float`): Share of items whose target greedy decoding would have written.
        stderr (`float`): Its standard error over items.
        num_items (`int`): Items measured.
        num_too_long (`int`): Items left out because the model's context is shorter.
        cells (`list[Cell]`): By length and depth, where the items state them.
    """

    accuracy: float
    stderr: float
    num_items: int
    num_too_long: int
    cells: list[Cell]


def measure_retrieval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    batch_size: int = 1,
    cache_kind: CacheKind = DYNAMIC,
) -> Retrieval:
    """
    Whether greedy decoding completes each context with its target. One forward pass tells: it does if every token of
    the target is the likeliest behind those before it.

    Args:
        items (`Sequence[dict]`): `{"context", "target"}`, and "length" and "depth" (0 to 1) for the map of cells.
        batch_size (`int`, *optional*, defaults to 1): Contexts at a time; long ones leave no room for more.
        cache_kind (`CacheKind`): In what cache the target finds the context.

    Raises:
        ValueError: If an item lacks its parts, or none fits into the model's context.
    """
    limit = model.config.max_position_embeddings
    fitting, requests = [], []
    for index, item in enumerate(items):
        name = item.get("id", str(index))
        if missing := [key for key in ("context", "target") if key not in item]:
            raise ValueError(f"Item {name} has no {' and no '.join(missing)}.")
        try:
            requests.append(encode_request(tokenizer, name, item["context"], [item["target"]], limit))
            fitting.append(item)
        except ValueError:
            if "length" not in item:  # a plain completion is no test of length: it is refused as it stands
                raise
    if not requests:
        raise ValueError(f"None of the {len(items)} items fits into the model's context of {limit} tokens.")
    scores = score_requests(model, requests, batch_size, "Retrieval", cache_kind)
    hits = [float(scored[0].greedy) for scored in scores]
    return Retrieval(mean(hits), mean_stderr(hits), len(hits), len(items) - len(hits), group_cells(fitting, hits))


def group_cells(items: Sequence[Item], hits: Sequence[float]) -> list[Cell]:
    """Accuracy by stated length and by depth in five equal ranges; nothing for items that state neither."""
    groups: dict[tuple[float, int], list[float]] = {}
    for item, hit in zip(items, hits, strict=True):
        if "depth" in item:
            row = min(int(item["depth"] * DEPTH_BINS), DEPTH_BINS - 1)
            groups.setdefault((item["length"], row), []).append(hit)
    return [
        Cell(length, (row + 0.5) / DEPTH_BINS, mean(values), len(values))
        for (length, row), values in sorted(groups.items())
    ]


@dataclass(frozen=True)
class PositionRange:
    """
    Perplexity of the tokens at positions `begin` to `end` - 1 of long documents.

    Attributes:
        losses (`list[float]`): In nats a token, of each document: what is compared with the original's.
    """

    begin: int
    end: int
    perplexity: Perplexity
    losses: list[float]


def measure_position_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    length: int,
    cache_kind: CacheKind = DYNAMIC,
) -> list[PositionRange]:
    """
    Perplexity by position over the first tokens of long documents, in ranges that double: [1, 128), [128, 256), ...
    Only documents with at least `length` tokens count, so that every range is about the same documents. Standard
    errors are over documents.

    Args:
        length (`int`): Tokens of each document, the prefix token included.
        cache_kind (`CacheKind`): Through what cache a document is read.

    Raises:
        ValueError: If the model's context is shorter, all documents are, or a loss is not finite.
    """
    limit = model.config.max_position_embeddings
    if not 2 <= length <= limit:
        raise ValueError(f"Documents must be measured over 2 to {limit} tokens (the model's context), got {length}.")
    documents = [ids[:length] for ids in (text_tokens(tokenizer, text) for text in texts) if len(ids) >= length]
    if not documents:
        raise ValueError(f"None of the {len(texts)} documents has {length} tokens. Lower the length.")
    bar = tqdm(documents, desc="Perplexity by position", unit="document")
    per_document = []
    for number, ids in enumerate(bar, 1):
        per_document.append(token_losses(model, ids, cache_kind=cache_kind))
        check_finite(per_document[-1], f"Document {number} of {length} tokens: the losses")
    losses = torch.stack(per_document).double()  # [documents, length - 1], position 1 on
    ranges = []
    begin, end = 1, min(128, length)
    while begin < length:
        part = losses[:, begin - 1 : end - 1]
        perplexity = Perplexity.from_sums(part.sum(-1).tolist(), [part.shape[1]] * len(part))
        ranges.append(PositionRange(begin, end, perplexity, part.mean(-1).tolist()))
        begin, end = end, min(2 * end, length)
    return ranges
