"""From data sets, files and recipes to packed rows, through the `datasets` library.

Streamed or not, the same steps are taken: each source is tokenised and packed for itself, so that its weight is a
share of the tokens and no row mixes sources; then rows are drawn from the sources.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from glob import glob
from pathlib import Path
from typing import TypeAlias

from datasets import (
    Dataset,
    Features,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
)
from transformers import PreTrainedTokenizerBase

from mha2mla.common.files import read_yaml
from mha2mla.common.text import FILE_BUILDERS

from .arguments import DataArguments
from .packing import is_chat, pack_documents, tokenize

RECIPES = {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}
DOCUMENTS_PER_BATCH = 1000  # packed together; what does not fill the last row of a batch is dropped
ROW_FEATURES = Features({"input_ids": List(Value("int32")), "lengths": List(Value("int32"))})

Rows: TypeAlias = Dataset | IterableDataset  # of `input_ids` [length] and `lengths`, see `pack_documents`


@dataclass(frozen=True)
class DataSource:
    """
    One data set of a mixture.

    Attributes:
        data (`str`): OWNER/NAME on the Hub, or files; patterns name several.
        subset (`str`, *optional*): Configuration of a data set on the Hub.
        split (`str`): Split of a data set on the Hub.
        column (`str`): Column of the text, or of the messages of a chat.
        weight (`float`): Share of the tokens, relative to the other sources.
    """

    data: str
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    weight: float = 1.0

    def __post_init__(self):
        if not isinstance(self.weight, int | float) or self.weight <= 0:
            raise ValueError(f"{self}: weight={self.weight!r} must be a number above 0. Leave the source out instead.")

    def __str__(self) -> str:
        return f"{self.data} ({self.subset})" if self.subset else self.data


def read_recipe(path: Path) -> list[DataSource]:
    """The sources of a recipe: a YAML list of mappings with the attributes of [`DataSource`]."""
    entries = read_yaml(path)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must be a list of sources, each with `data` and `weight`.")
    known = [f.name for f in fields(DataSource)]
    sources = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or "data" not in entry:
            raise ValueError(f"{path}: source {number} has no `data`.")
        for name in entry:
            if name not in known:
                raise ValueError(f"{path}: source {number} has {name!r}; there are {', '.join(known)}.")
        sources.append(DataSource(**entry))
    return sources


def find_sources(data: str, arguments: DataArguments) -> list[DataSource]:
    """
    What `--data` or `--eval-data` names.

    Raises:
        ValueError: If it is neither a recipe, nor files that exist, nor a name on the Hub.
    """
    if Path(data).suffix in (".yaml", ".yml"):
        return read_recipe(Path(data))
    if data in RECIPES:
        return read_recipe(RECIPES[data])
    if find_builder(data) is None and data.count("/") != 1:
        raise ValueError(
            f"{data!r} is no recipe (there are {', '.join(RECIPES)}), no {', '.join(FILE_BUILDERS)} file, and no name "
            "on the Hub, which has the form OWNER/NAME."
        )
    return [DataSource(data, arguments.subset, arguments.split, arguments.column)]


def find_builder(data: str) -> str | None:
    """The builder of `datasets` for local files, by their ending; None for a name on the Hub."""
    endings = [suffix for suffix in Path(data).suffixes if suffix in FILE_BUILDERS]
    return FILE_BUILDERS[endings[-1]] if endings else None


def load_source(source: DataSource, streaming: bool) -> Rows:
    """The documents of a source."""
    builder = find_builder(source.data)
    if builder is None:
        return load_dataset(source.data, source.subset, split=source.split, streaming=streaming)
    files = sorted(file for file in glob(source.data) if Path(file).stat().st_size > 0)
    if not files:
        raise ValueError(f"{source}: there is no such file, or it is empty.")
    options = {"sample_by": "paragraph"} if builder == "text" else {}
    return load_dataset(builder, data_files=files, split="train", streaming=streaming, **options)


def check_source(source: DataSource, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Look at the first document, before the whole set is read and long before a model is.

    Raises:
        ValueError: If there is none, or it has no such column, or it is a chat and the tokenizer has no template.
    """
    document = next(iter(load_source(source, streaming=True)), None)
    if document is None:
        raise ValueError(f"{source} is empty.")
    if source.column not in document:
        raise ValueError(
            f"{source} has no column {source.column!r}; it has {', '.join(document)}. Set --column, or `column` in "
            "the recipe. (A set that holds ids only, such as the Hub's python-edu, must be given its text first.)"
        )
    value = document[source.column]
    if not is_chat(value) and not isinstance(value, str):
        raise ValueError(f"{source}: column {source.column!r} holds neither text nor messages, but {value!r:.80}.")
    if is_chat(value) and tokenizer.chat_template is None:
        raise ValueError(f"{source}: column {source.column!r} holds messages, and the tokenizer has no chat template.")


def pack_batch(
    batch: dict[str, list], column: str, tokenizer: PreTrainedTokenizerBase, length: int, short_length: int | None
) -> dict[str, list[list[int]]]:
    """[`tokenize`] and [`pack_documents`] on a batch of documents by column."""
    return pack_documents(tokenize(batch[column], tokenizer), length, short_length)


def pack_source(
    documents: Rows,
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    short_length: int | None,
    num_proc: int | None,
) -> Rows:
    """The packed rows of a source's documents; a stream stays one."""
    columns = documents.column_names or list(next(iter(documents)))
    return documents.map(
        pack_batch,
        batched=True,
        batch_size=DOCUMENTS_PER_BATCH,
        fn_kwargs=dict(column=source.column, tokenizer=tokenizer, length=length, short_length=short_length),
        remove_columns=columns,
        features=ROW_FEATURES,
        **({} if isinstance(documents, IterableDataset) else {"num_proc": num_proc}),
    )


def mix(rows: list[Rows], weights: Sequence[float], seed: int) -> Rows:
    """Rows drawn from several sources by weight, until each has been read once; smaller ones begin again."""
    if len(rows) == 1:
        return rows[0]
    probabilities = [weight / sum(weights) for weight in weights]
    return interleave_datasets(rows, probabilities, seed=seed, stopping_strategy="all_exhausted")


def load_rows(arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Rows, Dataset | None]:
    """
    Rows to train on and, if asked for, rows held out.

    The held-out share is taken of the documents, not of the rows, so that none lies in both. Rows to train on are
    shuffled here and stay in that order: the Trainer's own order depends on the number of processes.

    Raises:
        ValueError: If a source cannot be used; the first document of each is looked at before anything else is done.
    """
    sources = find_sources(arguments.data, arguments)
    eval_sources = find_sources(arguments.eval_data, arguments) if arguments.eval_data else []
    for source in (*sources, *eval_sources):
        check_source(source, tokenizer)

    def pack(documents: Rows, source: DataSource, short_length: int | None = None) -> Rows:
        return pack_source(documents, source, tokenizer, arguments.length, short_length, arguments.num_proc)

    train, held_out = [], [pack(load_source(source, streaming=False), source) for source in eval_sources]
    for source in sources:
        documents = load_source(source, arguments.streaming)
        if arguments.eval_fraction > 0:
            parts = documents.train_test_split(test_size=arguments.eval_fraction, seed=seed)
            documents = parts["train"]
            held_out.append(pack(parts["test"], source))
        train.append(pack(documents, source, arguments.short_length))
    for part, name in ((train, "data"), (held_out, "held-out data")):
        for rows in part:
            if next(iter(rows), None) is None:
                raise ValueError(
                    f"A source of the {name} has less than one row of length={arguments.length} tokens. Give more "
                    "text, or lower --length."
                )
    rows = mix(train, [source.weight for source in sources], seed)
    shuffle = {"buffer_size": arguments.shuffle_buffer} if arguments.streaming else {}
    rows = rows.shuffle(seed=seed, **shuffle)
    # Weights do not count where rows are measured on: none may come twice.
    return rows, concatenate_datasets(held_out) if held_out else None
