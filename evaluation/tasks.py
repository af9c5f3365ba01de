"""Tasks of `mha2mla eval`: what a name means, and the measurement behind each kind."""

import hashlib
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate.utils import find_executable_batch_size
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mha2mla.common.files import shown
from mha2mla.common.hub import is_hub_name
from mha2mla.common.text_sources import TextSource
from mha2mla.common.tokenizer import check_known

from .caches import DYNAMIC, CacheKind
from .long_tasks import TASKS as LONG_TASKS
from .longrope import crosses, first_table, tables_mixed
from .measures.agreement import measure_agreement
from .measures.generated import make_example, measure_generated
from .measures.harness import measure_harness, require_harness_task
from .measures.items import Item, item_kind, read_items, read_texts
from .measures.long_context import measure_position_perplexity, measure_retrieval
from .measures.multiple_choice import measure_multiple_choice
from .measures.perplexity import Perplexity, measure_text_perplexity
from .measures.scoring import encode_request, prefix_token
from .settings import EvaluationSettings

# What a file of texts is measured with if its name says so; a bare name means the first.
TEXT_KINDS = ("perplexity", "positions", "agreement")
LONG = "long"  # before the name of a generated task
LONG_ITEMS = 100  # at each length
# Kind by the form of a file's items.
FILE_KINDS = {"choice": "choice", "completion": "retrieval", "text": TEXT_KINDS[0]}

READ = ("text", "context", "choices", "target")  # of an item, by a model


@dataclass(frozen=True)
class Task:
    """
    Attributes:
        name (`str`): As the user gave it.
        kind (`str`): "choice", "retrieval", "perplexity", "positions", "agreement", "long", or "harness".
        items (`list`): What is measured on; empty for lm-evaluation-harness, which brings its own. Seeds and lengths
            where prompts are generated.
        digest (`str`): Of the items, by which a continued run sees that they changed.
    """

    name: str
    kind: str
    items: list[Item]
    digest: str


@dataclass(frozen=True)
class TaskData:
    """
    What `--data` names, and how it is read.

    Attributes:
        data (`str`, *optional*): A folder of .jsonl (or .json) files of items, whose names are their tasks; one such
            file; or text: another kind of file, or OWNER/NAME on the Hub.
        column (`str`): Of the text.
        subset (`str`, *optional*), split (`str`): Of a data set on the Hub.
    """

    data: str | None = None
    column: str = "text"
    subset: str | None = None
    split: str = "train"

    def sources(self) -> dict[str, str]:
        """
        What can be measured, by the task's name.

        Raises:
            ValueError: If `data` names nothing, or two files of one task.
        """
        if self.data is None:
            return {}
        path = Path(self.data)
        if path.is_dir():
            files: dict[str, str] = {}
            for file in filter(is_item_file, shown(path)):
                if file.stem in files:
                    first = Path(files[file.stem]).name
                    raise ValueError(
                        f"--data {self.data} has {first} and {file.name}, and both would be the task {file.stem}. "
                        "Rename one."
                    )
                files[file.stem] = str(file)
            if not files:
                raise ValueError(f"--data {self.data} has no .jsonl or .json file.")
            return files
        if TextSource(self.data).builder is None and not is_hub_name(self.data):
            raise ValueError(
                f"--data {self.data} is not a folder, not a .jsonl, .json, .txt or .parquet file, and not the name "
                "of a data set on the Hub, which has the form OWNER/NAME."
            )
        return {path.name.split(".")[0]: self.data}

    def lacks(self, name: str) -> str:
        """For a person: that there is no source of that name, and what there is instead."""
        if self.data is None:
            return f"There is no file for the task {name!r}: --data names the folder of such files."
        there = list(self.sources())
        near = get_close_matches(name, there)
        instead = f"Did you mean {' or '.join(near)}?" if near else f"--data has {', '.join(there)}."
        if Path(self.data).is_dir():
            return f"There is no {name}.jsonl in {self.data}. {instead}"
        return f"The task {name!r} is not in --data {self.data}. {instead}"

    def read(self, source: str, limit: int | None) -> list[Item]:
        """The items of one of the sources; at most `limit`, if it is text."""
        if is_item_file(Path(source)):
            return read_items(Path(source), self.column)
        return read_texts(TextSource(source, self.subset, self.split, self.column), limit)


def is_item_file(path: Path) -> bool:
    return path.suffix in (".json", ".jsonl")


def find_tasks(
    names: Sequence[str] | None,
    data: TaskData,
    limit: int | None,
    contexts: Sequence[int] = (1024,),
    seed: int = 0,
) -> list[Task]:
    """
    Tasks by name: `NAME` is a file `NAME.jsonl` (or .json) of the data folder, measured as its items' form says, or
    else a task of lm-evaluation-harness; `positions:NAME` and `agreement:NAME` measure a file of texts otherwise,
    `long:NAME` is generated, and `harness:NAME` is lm-evaluation-harness' even where there is a file of that name.

    All files are read and checked, so that a mistake shows before anything is measured.

    Args:
        names (`Sequence[str]`, *optional*): All files of the folder if not given.
        limit (`int`, *optional*): Items of each task at most; of a generated one, at each length.
        contexts (`Sequence[int]`): Tokens of generated prompts.
        seed (`int`): Of these.

    Raises:
        ValueError: If a name is unknown, an item malformed, or a file's items do not have the form asked for.
    """
    sources = data.sources()
    if not names and not sources:
        raise ValueError("There is nothing to measure: give --tasks, or --data with files of items.")
    return [
        long_task(name, contexts, limit or LONG_ITEMS, seed)
        if name.startswith(f"{LONG}:")
        else find_task(name, sources, data, limit)
        for name in dict.fromkeys(names or sources)
    ]


def long_task(name: str, contexts: Sequence[int], count: int, seed: int) -> Task:
    """A generated task, `count` prompts of each length."""
    stem = name.removeprefix(f"{LONG}:")
    if stem not in LONG_TASKS:
        raise ValueError(f"Unknown task {name!r}: there are {', '.join(f'{LONG}:{known}' for known in LONG_TASKS)}.")
    items = [
        {"id": f"{length}-{i}", "seed": f"{seed}-{i}", "length": length}
        for length in sorted(set(contexts))
        for i in range(count)
    ]
    sample = LONG_TASKS[stem].make(random.Random(seed), 10).prompt  # changes if what is generated does
    return Task(name, LONG, items, hashlib.sha256(json.dumps([items, sample]).encode()).hexdigest())


def find_task(name: str, sources: dict[str, str], data: TaskData, limit: int | None) -> Task:
    """One task of [`find_tasks`]."""
    prefix, _, stem = name.rpartition(":")
    if prefix not in ("", "harness", *TEXT_KINDS):
        known = ", ".join((*TEXT_KINDS, LONG))
        raise ValueError(f"Unknown task {name!r}: before the colon stands {known} or harness, got {prefix!r}.")
    if prefix == "harness" or (prefix == "" and stem not in sources):
        try:
            require_harness_task(stem)
        except ValueError as error:
            if prefix == "harness":
                raise
            raise ValueError(f"{data.lacks(stem)} {error}") from None
        return Task(name, "harness", [], "")
    if stem not in sources:
        raise ValueError(data.lacks(stem))
    items = data.read(sources[stem], limit)
    form = item_kind(items[0], sources[stem])
    if prefix and form != "text":
        raise ValueError(f"Task {name!r} needs items with `text`; {sources[stem]} has {form} items.")
    kind = prefix or FILE_KINDS[form]
    digest = hashlib.sha256(json.dumps(items).encode()).hexdigest()
    if limit is not None:
        # Retrieval files are sorted by length; a few of their items shall still cover all lengths.
        step = len(items) / limit if "length" in items[0] and len(items) > limit else 1
        items = [items[int(i * step)] for i in range(min(limit, len(items)))]
    return Task(name, kind, items, digest)


def measure_task(
    task: Task,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    original: PreTrainedModel,
    settings: EvaluationSettings,
    batch_size: int | None,
    cache_kind: CacheKind = DYNAMIC,
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
    if task.kind == LONG:
        module = LONG_TASKS[task.name.removeprefix(f"{LONG}:")]
        return asdict(sized(lambda size: measure_generated(model, tokenizer, module, task.items, size, cache_kind)))
    texts = [item["text"] for item in task.items]
    if task.kind == "perplexity":
        window = (settings.length, settings.stride)
        return perplexity_numbers(measure_text_perplexity(model, tokenizer, texts, *window, cache_kind))
    if task.kind == "positions":
        ranges = measure_position_perplexity(model, tokenizer, texts, settings.long_length, cache_kind)
        return {
            "ranges": [
                {"begin": r.begin, "end": r.end, "losses": r.losses} | perplexity_numbers(r.perplexity) for r in ranges
            ]
        }
    assert task.kind == "agreement"
    sizes = (settings.agreement_length, settings.prompt_length, settings.new_tokens)
    return asdict(measure_agreement(original, model, tokenizer, texts, *sizes, cache_kind))


def check_lengths(path: str, context: int, tasks: Sequence[Task], settings: EvaluationSettings) -> None:
    """
    Raises:
        ValueError: If a task reads more tokens at a time than a model's context has: now, not after an hour of others.
    """
    shortest = min((item["length"] for task in tasks if task.kind == LONG for item in task.items), default=0)
    for kind, option, length in (
        ("perplexity", "--length", settings.length),
        ("positions", "--long-length", settings.long_length),
        ("agreement", "--agreement-length", settings.agreement_length),
        ("agreement", "--prompt-length plus --new-tokens of", settings.prompt_length + settings.new_tokens),
        (LONG, "--contexts", shortest),
    ):
        name = next((task.name for task in tasks if task.kind == kind), None)
        if name is not None and length > context:
            raise ValueError(
                f"{name} would be read {length} tokens at a time, and the context of {path} has {context}: give "
                f"{option} {context} or less."
            )


def check_tables(
    config: PreTrainedConfig,
    tasks: Sequence[Task],
    settings: EvaluationSettings,
    caches: Sequence[CacheKind],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Raise a `ValueError` if a text would outgrow longrope's first table, and a cache takes it in pieces."""
    kind = next((kind for kind in caches if kind.has_window), None)
    if kind is None or first_table(config) == float("inf"):
        return
    lengths = {
        "perplexity": ("--length", settings.length, 0),
        "positions": ("--long-length", settings.long_length, 1),  # the last token is only predicted
        "agreement": ("--agreement-length", settings.agreement_length, 0),
    }
    for task in tasks:
        if task.kind in lengths:
            option, length, more = lengths[task.kind]
            if crosses(config, 0, length - more):
                remedy = f"Give {option} {first_table(config) + more} or less"
                raise tables_mixed(task.name, config, length - more, kind, remedy)
        elif task.kind in ("choice", "retrieval"):
            for number, item in enumerate(task.items):
                name, texts = str(item.get("id", number)), [" " + choice for choice in item.get("choices", [])]
                texts = texts or [item["target"]]
                request = encode_request(tokenizer, name, item["context"], texts, sys.maxsize)
                if request.num_tokens <= config.max_position_embeddings:  # others are refused, or left out
                    request.check_pieces(config, kind, f"{task.name}, item {name},")


def check_prompts(tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `ValueError` if the shortest prompt of a generated task cannot be as short as it is asked for."""
    for task in tasks:
        if task.kind == LONG:
            try:
                make_example(LONG_TASKS[task.name.removeprefix(f"{LONG}:")], task.items[0], tokenizer)
            except ValueError as error:
                raise ValueError(f"{task.name}: {error} Give larger --contexts.") from None


def check_tokens(path: str, vocab_size: int, tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `ValueError` for a token that was added to a tokenizer and not to its model, if a task has it. Others of
    that kind, such as `[PAD]`, may never be met."""
    if len(tokenizer) <= vocab_size:
        return
    for task in tasks:
        parts = [item[name] for item in task.items for name in READ if name in item]
        texts = [text for part in parts for text in ([part] if isinstance(part, str) else part)]
        largest = max([prefix_token(tokenizer), *chain.from_iterable(map(tokenizer.encode, texts))])
        check_known(f"{task.name}, as {path} reads it,", largest, vocab_size)


def perplexity_numbers(perplexity: Perplexity) -> dict[str, Any]:
    """Its attributes, and what follows from them."""
    derived = dict(perplexity=perplexity.perplexity, stderr=perplexity.stderr, bits_per_byte=perplexity.bits_per_byte)
    return asdict(perplexity) | derived
