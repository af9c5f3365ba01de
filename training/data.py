"""From data sets, files and recipes to packed rows, through the `datasets` library.

Streamed or not, the same steps are taken: each source is tokenised and packed for itself, so that its weight is a
share of the tokens and no row mixes sources; then rows are drawn from the sources.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from textwrap import shorten
from typing import TypeAlias

import numpy as np
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    interleave_datasets,
)
from transformers import PreTrainedTokenizerBase

from mha2mla.common.text_sources import (
    LOOKED_AT,
    TextError,
    TextSource,
    arises_in_datasets,
    check_source,
    clean_documents,
    find_fault,
    find_sources,
    load_source,
    reading,
)

from .arguments import DataArguments
from .lookback import add_lookback
from .packing import pack_documents, tokenize

# Documents packed together; what does not fill the last row of a batch is dropped. More where they are short, so that
# it is one row of many.
DOCUMENTS_PER_BATCH, MOST_DOCUMENTS, ROWS_PER_BATCH = 1000, 2**16, 50
FIRST_ROWS = 2**16  # among which the number of a batch's first row is drawn
ROW_FEATURES = Features({"input_ids": List(Value("int32")), "lengths": List(Value("int32"))})

Rows: TypeAlias = Dataset | IterableDataset  # of `input_ids` [length] and `lengths`, see `pack_documents`


def pack_batch(
    batch: dict[str, list],
    source: TextSource,
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    short_lengths: Sequence[int],
    lookback_share: float,
    seed: int,
) -> dict[str, list[list[int]]]:
    """[`tokenize`], [`pack_documents`] and [`add_lookback`] on a batch of a source's rows."""
    documents = clean_documents(batch[column], source, column)
    tokens = tokenize(documents, tokenizer)
    # A batch of short documents has few rows. If each began with the first turn, those behind would hardly come.
    first_row = int(np.random.default_rng([seed, *chain.from_iterable(tokens[:1])]).integers(FIRST_ROWS))
    rows = pack_documents(tokens, length, short_lengths, first_row)
    add_lookback(rows, lookback_share, seed, first_row)
    return rows


def documents_per_batch(
    documents: Rows, source: TextSource, column: str, tokenizer: PreTrainedTokenizerBase, length: int
) -> int:
    """So many that they fill [`ROWS_PER_BATCH`] rows, judged by the first."""
    first = clean_documents([row.get(column) for row in islice(documents, LOOKED_AT)], source, column)
    sizes = [len(ids) for ids in tokenize(first, tokenizer)]
    wanted = ROWS_PER_BATCH * length * len(sizes) // max(1, sum(sizes))
    return min(max(wanted, DOCUMENTS_PER_BATCH), MOST_DOCUMENTS)


def pack_source(documents: Rows, num_proc: int | None, **how) -> Rows:
    """The rows that [`pack_batch`] makes of a source's documents; a stream stays one."""
    columns = documents.column_names or list(next(iter(documents)))
    return documents.map(
        pack_batch,
        batched=True,
        batch_size=documents_per_batch(documents, how["source"], how["column"], how["tokenizer"], how["length"]),
        fn_kwargs=how,
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


def data_sources(arguments: DataArguments) -> tuple[list[TextSource], list[TextSource]]:
    """The sources to train on, and those held out."""

    def find(data: str | None) -> list[TextSource]:
        return find_sources(data, arguments.column, arguments.subset, arguments.split) if data else []

    return find(arguments.data), find(arguments.eval_data)


def load_rows(arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Rows, Dataset | None]:
    """
    Rows to train on and, if asked for, rows held out.

    The held-out share is taken of the documents, not of the rows, so that none lies in both. Rows to train on are
    shuffled here and stay in that order: the Trainer's own order depends on the number of processes.

    Raises:
        ValueError: If a source cannot be used; the first document of each is looked at before anything else is done.
    """
    sources, eval_sources = data_sources(arguments)
    columns = {source: check_source(source, tokenizer) for source in (*sources, *eval_sources)}

    def pack(
        documents: Rows, source: TextSource, short_lengths: Sequence[int] = (), lookback_share: float = 0.0
    ) -> Rows:
        with reading(source):
            return pack_source(
                documents,
                arguments.num_proc,
                source=source,
                column=columns[source].name,
                tokenizer=tokenizer,
                length=arguments.length,
                short_lengths=short_lengths,
                lookback_share=lookback_share,
                seed=seed,
            )

    train, held_out = [], [pack(load_source(source, streaming=False), source) for source in eval_sources]
    for source in sources:
        documents = load_source(source, arguments.streaming)
        if arguments.eval_fraction > 0:
            if math.ceil(arguments.eval_fraction * len(documents)) >= len(documents):
                if len(documents) == 1:
                    raise ValueError(
                        f"eval_fraction={arguments.eval_fraction}: {source} is a single document, and a share of it "
                        "cannot be held out. Give --eval_data or more documents."
                    )
                raise ValueError(
                    f"eval_fraction={arguments.eval_fraction} of the {len(documents)} documents of {source} leaves "
                    "none to train on. Lower it, or give --eval_data."
                )
            parts = documents.train_test_split(test_size=arguments.eval_fraction, seed=seed)
            documents = parts["train"]
            held_out.append(pack(parts["test"], source))
        train.append(pack(documents, source, arguments.short_lengths or (), arguments.lookback_share))
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


@contextmanager
def reading_rows(arguments: DataArguments) -> Iterator[None]:
    """Around what draws rows: a stream meets what is malformed in its files only then. One sentence, as
    [`reading`]."""
    try:
        yield
    except Exception as error:
        if not arises_in_datasets(error):
            raise
        sources = [source for part in data_sources(arguments) for source in part]
        fault = next((fault for source in sources if source.builder and (fault := find_fault(source))), None)
        reason = shorten(str(error), 200, placeholder=" ...") or type(error).__name__
        raise TextError(fault or f"{', '.join(map(str, sources))} cannot be read further: {reason}") from error
