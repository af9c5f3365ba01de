"""What text is called by, for calibration, training and evaluation alike: files, data sets on the Hub, and recipes.

A recipe is a YAML list of sources with weights. A document is a text, or a chat: a list of messages, each with a role.
"""

import math
import os
import re
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from glob import escape, glob
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .files import no_file, read_json_lines, read_lines, read_yaml
from .hub import data_sets_offline, hub_trouble, is_hub_name, of_cache, on_hub

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# Builder of the `datasets` library for each kind of local file.
FILE_BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
RECIPES = {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}
COLUMNS = ("text", "messages")  # looked for, in this order, where the user names none
LOOKED_AT = 100  # rows among which a source must have a document


class TextError(ValueError):
    """What is wrong with a text, said for its user."""


class Column(NamedTuple):
    """Where the documents of a source are, and whether they are chats."""

    name: str
    chats: bool


@dataclass(frozen=True)
class TextSource:
    """
    A data set of the Hub, or local files.

    Attributes:
        data (`str`): OWNER/NAME on the Hub, or files; patterns name several.
        subset (`str`, *optional*): Configuration of a data set on the Hub.
        split (`str`): Split of a data set on the Hub.
        column (`str`, *optional*): Column of the text, or of the messages of a chat; by default `text`, or `messages`
            where there is no such column.
        weight (`float`): Share of the tokens, relative to the other sources of a recipe.
    """

    data: str
    subset: str | None = None
    split: str = "train"
    column: str | None = None
    weight: float = 1.0

    def __post_init__(self):
        for name in ("data", "subset", "split", "column"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (value is None and name in ("subset", "column")):
                raise ValueError(f"{self.data}: {name}={value!r} must be a string. Put it in quotes.")
        number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if not number or not 0 < self.weight < math.inf:
            raise ValueError(f"{self}: weight={self.weight!r} must be a number above 0, such as 0.5.")

    def __str__(self) -> str:
        return f"{self.data} ({self.subset})" if self.subset else self.data

    @property
    def builder(self) -> str | None:
        """The builder of `datasets` for local files, by their ending; None for a data set on the Hub."""
        endings = [suffix for suffix in Path(self.data).suffixes if suffix in FILE_BUILDERS]
        return FILE_BUILDERS[endings[-1]] if endings else None

    def files(self) -> list[str]:
        """
        The local files that it names, those that are empty left out.

        Raises:
            ValueError: If there is none.
        """
        found = local_files(self.data)
        if not found:
            raise TextError(no_file(self.data))
        files = [file for file in found if Path(file).stat().st_size > 0]
        if not files:
            raise TextError(f"{self.data}: the file is there, but it is empty.")
        return files


def local_files(data: str) -> list[str]:
    """The files of a name, or else of a pattern: a name may hold the characters of one."""
    return [data] if Path(data).is_file() else [file for file in sorted(glob(data)) if Path(file).is_file()]


def is_chat(document: Any) -> bool:
    """Whether a document is a list of messages rather than text."""
    return isinstance(document, list) and all(isinstance(message, dict) and "role" in message for message in document)


def render_chats(chats: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """
    Token ids of chats as the tokenizer's template writes them, which brings its own special tokens.

    Raises:
        ValueError: If the template refuses a chat, as some do where user and assistant do not take turns, or fails at
            what a chat holds.
    """
    try:
        return tokenizer.apply_chat_template(list(chats), tokenize=True, return_dict=True)["input_ids"]
    except TemplateError as error:
        raise TextError(f"The tokenizer's chat template refuses a chat: {error}") from error
    except (TypeError, ValueError, AttributeError, LookupError) as error:  # a template computes with what a chat holds
        raise TextError(
            f"The tokenizer's chat template cannot render the content of a chat: {error}. Most take a string for each "
            "message's `content`, no list of parts: write the chats so, or give a tokenizer whose template takes them."
        ) from error


def read_recipe(path: Path) -> list[TextSource]:
    """The sources of a recipe: a YAML list of mappings with the attributes of [`TextSource`]."""
    entries = read_yaml(path)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must be a list of sources, each with `data` and `weight`.")
    known = [f.name for f in fields(TextSource)]
    sources = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or "data" not in entry:
            raise ValueError(f"{path}: source {number} has no `data`.")
        for name in entry:
            if name not in known:
                raise ValueError(f"{path}: source {number} has {name!r}; there are {', '.join(known)}.")
        try:
            sources.append(TextSource(**entry))
        except ValueError as error:
            raise ValueError(f"{path}: source {number}: {error}") from None
    return sources


def find_sources(
    data: str, column: str | None = None, subset: str | None = None, split: str = "train"
) -> list[TextSource]:
    """
    What a user names as text: one source, or those of a recipe, which has columns, subsets and splits of its own.

    Raises:
        ValueError: If it is neither a recipe, nor files of a known kind, nor a name on the Hub.
    """
    recipe = Path(data) if Path(data).suffix in (".yaml", ".yml") else RECIPES.get(data)
    if recipe is not None:
        for name, value, left_out in (("column", column, None), ("subset", subset, None), ("split", split, "train")):
            if value != left_out:
                raise ValueError(f"{name}={value!r}: each source of the recipe {data} says its own. Leave it out.")
        return read_recipe(recipe)
    source = TextSource(data, subset, split, column)
    if source.builder is None and local_files(data):
        raise ValueError(f"{data}: files of text must end in {', '.join(FILE_BUILDERS)} (or with .gz after it).")
    if source.builder is None and not is_hub_name(data):
        raise ValueError(
            f"{data!r} is no recipe (there are {', '.join(RECIPES)}), no {', '.join(FILE_BUILDERS)} file, and no name "
            "on the Hub, which has the form OWNER/NAME."
        )
    return [source]


def check_files(sources: list[TextSource]) -> None:
    """Raise a `ValueError` if a source names local files of which there are none, before anything is downloaded."""
    for source in sources:
        if source.builder is not None:
            source.files()


def hub_datasets(data: str) -> list[str]:
    """Names of the data sets on the Hub that a text comes from, for a model card."""
    return list(dict.fromkeys(source.data for source in find_sources(data) if source.builder is None))


def load_source(source: TextSource, streaming: bool) -> "Dataset | IterableDataset":
    """The rows of a source, through the `datasets` library; paragraphs of .txt files are rows with a column `text`."""
    from datasets import load_dataset  # slow to import, and what is tokenised already does without it

    if source.builder is None:
        load = partial(load_dataset, source.data, source.subset, split=source.split, streaming=streaming)
        trouble = hub_trouble(source.data, "README.md", repo_type="dataset") if on_hub(source.data) else None
        if trouble is None:
            return load()
        try:
            with data_sets_offline():
                return load()
        except (OSError, ValueError):  # it was not downloaded before
            raise TextError(trouble) from None
    options = {"sample_by": "paragraph"} if source.builder == "text" else {}
    with reading(source):
        # `datasets` takes every name for a pattern, those of the folders above a relative one included.
        files = [escape(os.path.abspath(file)) for file in source.files()]
        return load_dataset(source.builder, data_files=files, split="train", streaming=streaming, **options)


def find_column(source: TextSource, names: list[str]) -> str:
    """
    The column that holds the documents.

    Raises:
        ValueError: If it is not among the names.
    """
    wanted = COLUMNS if source.column is None else (source.column,)
    for column in wanted:
        if column in names:
            return column
    raise TextError(
        f"{source} has no column {wanted[0]!r}; it has {', '.join(names)}. Set --column, or `column` in the recipe. "
        "(A set that holds ids only, such as the Hub's python-edu, must be given its text first.)"
    )


def check_source(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> Column:
    """
    Look at the first document, before the whole set is read and long before a model is.

    Raises:
        ValueError: If there is none, or it has no such column, or it is a chat and the tokenizer has no template.
    """
    with reading(source):
        rows = list(islice(load_source(source, streaming=True), LOOKED_AT))
    if not rows:
        raise TextError(f"{source}: the file is there, but it is empty." if source.builder else f"{source} is empty.")
    column = find_column(source, list(rows[0]))
    documents = clean_documents([row.get(column) for row in rows], source, column)
    if not documents:
        raise TextError(
            f"{source}: column {column!r} is empty in the first {len(rows)} rows. Remove the rows without text, or "
            "name another column (--column, or `column` in the recipe)."
        )
    chats = is_chat(documents[0])
    if chats and tokenizer.chat_template is None:
        raise TextError(f"{source}: column {column!r} holds messages, and the tokenizer has no chat template.")
    return Column(column, chats)


def clean_documents(values: list[Any], source: TextSource, column: str) -> list[Any]:
    """
    Values of a column without those that are empty (null, or no text).

    Raises:
        ValueError: If one is neither text nor a chat; with the line of the file, where there are lines.
    """
    documents = [value for value in values if value is not None and value != "" and value != []]
    for document in documents:
        if not is_document(document):
            raise TextError(find_fault(source, column) or f"{source}: {describe_fault(document, column)}")
    if len({is_chat(document) for document in documents}) > 1:
        raise TextError(f"{source}: column {column!r} mixes texts and chats. Give each a file of its own.")
    return documents


def is_document(value: Any) -> bool:
    return isinstance(value, str) or is_chat(value)


def describe_fault(value: Any, column: str) -> str:
    return f"column {column!r} holds neither text nor messages, but {value!r:.80}."


@contextmanager
def reading(source: TextSource) -> Iterator[None]:
    """Errors of the `datasets` library over local files, in one sentence; those of the Hub, and of what is ours, stay
    as they are."""
    try:
        yield
    except TextError as error:
        raise TextError(str(error)) from error  # of one from another process nothing tells any more that it is ours
    except Exception as error:
        if source.builder is None or not arises_in_datasets(error):
            raise
        reason = str(error.__cause__ or error).strip().split("\n")[0] or type(error).__name__
        raise TextError(find_fault(source) or f"{source} cannot be read as {source.builder}: {reason}") from error


def arises_in_datasets(error: BaseException) -> bool:
    """Whether the `datasets` library, or what it calls, made an error, rather than a function of ours that it called,
    and of the text rather than of its own cache. Of an error in a process of a data loader only the text tells."""
    import datasets

    if of_cache(getattr(error.__cause__ or error, "filename", None)):
        return False
    homes = [str(Path(datasets.__file__).parent), str(Path(__file__).parents[1])]
    files = re.findall(r'File "(.+?)", line', "".join(traceback.format_exception(error)))
    inside = [file.startswith(homes[0]) for file in files if file.startswith(tuple(homes))]
    return bool(inside) and inside[-1]


def find_fault(source: TextSource, column: str | None = None) -> str | None:
    """
    What is wrong with the .txt and .jsonl files of a source, at the first line that cannot be read, is no JSON object
    or, given a column, holds something else than a document in it. None if nothing is found, or the files are of
    another kind.
    """
    for path in map(Path, source.files() if source.builder else ()):
        try:
            if ".txt" in path.suffixes:
                deque(read_lines(path), maxlen=0)
            for number, row in read_json_lines(path) if ".jsonl" in path.suffixes else ():
                if not isinstance(row, dict):
                    return f"{path}:{number} is no JSON object: {row!r:.80}."
                value = None if column is None else row.get(column)
                if value is not None and not is_document(value):
                    assert column is not None
                    return f"{path}:{number}: {describe_fault(value, column)}"
        except ValueError as error:
            return str(error)
    return None
