"""All tables of an evaluation, in the order in which they are shown."""

from mha2mla.evaluation.results import Results

from .long_tables import long_tables
from .table import Table
from .tables import accuracy_tables, text_tables


def make_tables(results: Results) -> list[Table]:
    """All that have a column."""
    return [*accuracy_tables(results), *text_tables(results), *long_tables(results)]
