"""Tasks of `mha2mla eval`: what a name means, and the measurement behind each kind."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import find_executable_batch_size
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .measures.agreement import measure_agreement
from .measures.caches import PLAIN, CacheKind
from .measures.harness import measure_harness, require_harness_task
from .measures.items import Item, item_kind, read_items
from .measures.long_context import measure_position_perplexity, measure_retrieval
from .measures.multiple_choice import measure_multiple_choice
from .measures.perplexity import Perplexity, measure_text_perplexity

# What a file of texts is measured with if its name says so; a bare name means the first.
TEXT_KINDS = ("perplexity", "positions", "agreement")
# Kind by the form of a file's items.
FILE_KINDS = {"choice": "choice", "completion": "retrieval", "text": TEXT_KINDS[0]}


@dataclass(frozen=True)
class EvaluationSettings:
    """
    What the numbers depend on. A results file is continued only under the same settings.

    Args:
        limit (`int`, *optional*): Items of each task at most.
        length (`int`, *optional*, defaults to 1024): Tokens of a window of perplexity tasks.
        stride (`int`, *optional*): Tokens that a window adds; a window's length if not given.
        long_length (`int`, *optional*, defaults to 4096): Tokens of a document in tasks of perplexity by position.
        agreement_length (`int`, *optional*, defaults to 512): Tokens of a text in agreement tasks.
        prompt_length (`int`, *optional*, defaults to 64): Tokens that are continued in agreement tasks.
        new_tokens (`int`, *optional*, defaults to 64): Greedy tokens in agreement tasks.
        dtype (`str`, *optional*, defaults to `"auto"`): Of the weights and the cache; as they are saved.
        seed (`int`, *optional*, defaults to 0): Of what lm-evaluation-harness draws. Nothing else is random.
    """

    limit: int | None = field(default=None, metadata={"help": "Items of each task at most."})
    length: int = field(default=1024, metadata={"help": "Tokens of a window of perplexity tasks."})
    stride: int | None = field(default=None, metadata={"help": "Tokens that a window adds; its length if not given."})
    long_length: int = field(default=4096, metadata={"help": "Tokens of a document in `positions:` tasks."})
    agreement_length: int = field(default=512, metadata={"help": "Tokens of a text in `agreement:` tasks."})
    prompt_length: int = field(default=64, metadata={"help": "Tokens that are continued in `agreement:` tasks."})
    new_tokens: int = field(default=64, metadata={"help": "Greedy tokens in `agreement:` tasks."})
    dtype: str = field(default="auto", metadata={"help": "Of weights and cache: auto, float32, bfloat16, float16."})
    seed: int = field(default=0, metadata={"help": "Of what lm-evaluation-harness draws."})

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}.")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}.")


@dataclass(frozen=True)
class Task:
    """
    Attributes:
        name (`str`): As the user gave it.
        kind (`str`): "choice", "retrieval", "perplexity", "positions", "agreement", or "harness".
        items (`list`): What is measured on; empty for lm-evaluation-harness, which brings its own.
        digest (`str`): Of the items, by which a continued run sees that they changed.
    """

    name: str
    kind: str
    items: list[Item]
    digest: str


def find_tasks(names: list[str] | None, data_dir: Path | None, limit: int | None) -> list[Task]:
    """
    Tasks by name: `NAME` is a file `NAME.jsonl` (or .json) of the data folder, measured as its items' form says, or
    else a task of lm-evaluation-harness; `positions:NAME` and `agreement:NAME` measure a file of texts otherwise, and
    `harness:NAME` is lm-evaluation-harness' even where there is a file of that name.

    All files are read and checked, so that a mistake shows before anything is measured.

    Args:
        names (`list[str]`, *optional*): All files of the folder if not given.

    Raises:
        ValueError: If a name is unknown, an item malformed, or a file's items do not have the form asked for.
    """
    files: dict[str, Path] = {}
    if data_dir is not None:
        if not data_dir.is_dir():
            raise ValueError(f"--data-dir {data_dir} is not a folder.")
        files = {path.stem: path for path in sorted(data_dir.iterdir()) if path.suffix in (".json", ".jsonl")}
        if not files:
            raise ValueError(f"--data-dir {data_dir} has no .jsonl or .json file.")
    if not names and not files:
        raise ValueError("There is nothing to measure: give --tasks, or --data-dir with files of items.")
    return [find_task(name, files, limit) for name in dict.fromkeys(names or files)]


def find_task(name: str, files: dict[str, Path], limit: int | None) -> Task:
    """One task of [`find_tasks`]."""
    prefix, _, stem = name.rpartition(":")
    if prefix not in ("", "harness", *TEXT_KINDS):
        raise ValueError(
            f"Unknown task {name!r}: before the colon stands {', '.join(TEXT_KINDS)} or harness, got {prefix!r}."
        )
    if prefix == "harness" or (prefix == "" and stem not in files):
        if prefix == "" and files:
            known = f"Files in --data-dir: {', '.join(files)}."
        else:
            known = "Give --data-dir for local files."
        try:
            require_harness_task(stem)
        except ValueError as error:
            raise ValueError(f"{error} {known}") from None
        return Task(name, "harness", [], "")
    if stem not in files:
        raise ValueError(f"Task {name!r} has no file; --data-dir has {', '.join(files) or 'none'}.")
    items = read_items(files[stem])
    form = item_kind(items[0], str(files[stem]))
    if prefix and form != "text":
        raise ValueError(f"Task {name!r} needs items with `text`; {files[stem]} has {form} items.")
    kind = prefix or FILE_KINDS[form]
    if limit is not None:
        # Retrieval files are sorted by length; a few of their items shall still cover all lengths.
        step = len(items) / limit if "length" in items[0] and len(items) > limit else 1
        items = [items[int(i * step)] for i in range(min(limit, len(items)))]
    digest = hashlib.sha256(files[stem].read_bytes()).hexdigest()
    return Task(name, kind, items, digest)


def measure_task(
    task: Task,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    original: PreTrainedModel,
    settings: EvaluationSettings,
    batch_size: int | None,
    cache_kind: CacheKind = PLAIN,
) -> dict[str, Any]:
    """
    Run a task; gives its numbers by name.

    Args:
        original (`PreTrainedModel`): What agreement is measured with.
        batch_size (`int`, *optional*): Items at a time; None looks for a size that fits into memory.
        cache_kind (`CacheKind`): How the model's cache is held; tasks of lm-evaluation-harness use none.
    """

    def sized(measure: Callable[[int], Any]) -> Any:
        if batch_size is not None:
            return measure(batch_size)
        start = 8 if model.device.type == "cpu" else 64
        return find_executable_batch_size(measure, starting_batch_size=start)()

    if task.kind == "harness":
        return sized(
            lambda size: measure_harness(
                model, tokenizer, task.name.rpartition(":")[2], settings.limit, size, settings.seed
            )
        )
    if task.kind == "choice":
        return asdict(sized(lambda size: measure_multiple_choice(model, tokenizer, task.items, size, cache_kind)))
    if task.kind == "retrieval":
        if "length" in task.items[0]:
            return asdict(measure_retrieval(model, tokenizer, task.items, cache_kind=cache_kind))
        return asdict(sized(lambda size: measure_retrieval(model, tokenizer, task.items, size, cache_kind)))
    texts = [item["text"] for item in task.items]
    if task.kind == "perplexity":
        window = (settings.length, settings.stride)
        return perplexity_numbers(measure_text_perplexity(model, tokenizer, texts, *window, cache_kind))
    if task.kind == "positions":
        ranges = measure_position_perplexity(model, tokenizer, texts, settings.long_length, cache_kind)
        return {"ranges": [{"begin": r.begin, "end": r.end} | perplexity_numbers(r.perplexity) for r in ranges]}
    assert task.kind == "agreement"
    sizes = (settings.agreement_length, settings.prompt_length, settings.new_tokens)
    return asdict(measure_agreement(original, model, tokenizer, texts, *sizes, cache_kind))


def perplexity_numbers(perplexity: Perplexity) -> dict[str, Any]:
    """Its attributes, and what follows from them."""
    derived = dict(perplexity=perplexity.perplexity, stderr=perplexity.stderr, bits_per_byte=perplexity.bits_per_byte)
    return asdict(perplexity) | derived
