"""Which items of a task read anything that a quantised cache has rounded.

Recent tokens stay in full precision, and of a converted model's text the first 128 until more are there. What is not
longer is the same with and without quantising: a figure of it would be one of a cache that was never read.
"""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .caches import CacheKind
from .measures.generated import NEW_TOKENS
from .measures.items import Item
from .settings import EvaluationSettings
from .tasks import LONG, Task

# What makes the items of a kind longer.
REMEDIES = {
    "choice": "items with longer contexts",
    "retrieval": "items with longer contexts",
    "perplexity": "longer texts, and a larger --length if that is shorter",
    "positions": "a larger --long-length",
    "agreement": "longer texts, and a larger --agreement-length if that is shorter",
    LONG: "larger --contexts",
}
GREEDY = ("matched_tokens", "matched_stderr", "identical")  # of an agreement task


def tokens_held(task: Task, item: Item, tokenizer: PreTrainedTokenizerBase, settings: EvaluationSettings) -> int:
    """Tokens in the cache where an item's last token is predicted; of choices and targets, where their first is."""
    if task.kind == LONG:
        return item["length"] - NEW_TOKENS
    if task.kind == "positions":
        return settings.long_length - 1
    if task.kind in ("choice", "retrieval"):
        return max(1, len(tokenizer.encode(item["context"].rstrip())))
    num_tokens = len(tokenizer.encode(item["text"], add_special_tokens=False))
    if task.kind == "perplexity":
        return min(num_tokens, settings.length)
    return min(1 + num_tokens, settings.agreement_length)


def count_read(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationSettings,
    kind: CacheKind,
    config: PreTrainedConfig,
) -> dict[str, Any]:
    """Numbers of a task beside those measured: "num_read" of "num_given" items hold more than "exact_tokens" tokens,
    which is what they take to read rounded ones. Nothing for a cache without a window."""
    if not kind.has_window:
        return {}
    exact = kind.exact_tokens(config)
    held = [tokens_held(task, item, tokenizer, settings) for item in task.items]
    held = [count for count in held if count <= config.max_position_embeddings]  # longer prompts are left out
    return {"num_read": sum(count > exact for count in held), "num_given": len(held), "exact_tokens": exact}


def only_read(numbers: dict[str, Any], task: Task, settings: EvaluationSettings) -> dict[str, Any]:
    """The numbers without those of greedy continuations of an agreement task that end before anything is rounded."""
    last = settings.prompt_length + settings.new_tokens - 1
    if task.kind != "agreement" or last > numbers.get("exact_tokens", 0):
        return numbers
    return {name: value for name, value in numbers.items() if name not in GREEDY}
