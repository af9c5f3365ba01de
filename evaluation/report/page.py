"""The files that show an evaluation: tables in markdown, and a page with pictures."""

import html
from pathlib import Path

from mha2mla.common.loading import distinct_names
from mha2mla.evaluation.results import Results

from .conversion import conversion_section, find_records
from .every_table import make_tables
from .figures import encode_png, make_figures
from .headline import page_title, results_in_words
from .html import html_page, html_picture, html_table
from .table import Table

PAGE_NAME = "report.html"
MARKDOWN_NAME = "table.md"


def made_by(results: Results) -> str:
    """What the last run was, in a sentence."""
    command, environment = results.runs[-1]["command"], results.runs[-1]["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    return f"Made by `{command}`, commit {environment['commit']}, on {environment['device']}; {versions}."


def write_page(folder: Path, results: Results) -> list[Table]:
    """Write the markdown file and the HTML page beside the results file; gives the tables."""
    tables = make_tables(results)
    text = "\n\n".join([*results_in_words(results), *(table.markdown() for table in tables)])
    (folder / MARKDOWN_NAME).write_text(f"{text}\n\n{made_by(results)}\n", encoding="utf-8")
    pictures = [html_picture(name, encode_png(figure)) for name, figure in make_figures(results)]
    parts = [f"<h2>{html.escape(table.title)}</h2>{html_table(table.header, table.rows)}" for table in tables]
    records = find_records(model.path for model in results.models)
    names = distinct_names(records)
    conversions = [conversion_section(names[path], record) for path, record in records.items()]
    command, environment = results.runs[-1]["command"], results.runs[-1]["environment"]
    notes = html_table(("made by", ""), [("command", command), *((k, str(v)) for k, v in environment.items())])
    opening = [f"<p class=result>{html.escape(sentence)}</p>" for sentence in results_in_words(results)]
    shown = f"<div class=pictures>{''.join(pictures)}</div>"
    body = "".join((*opening, shown, *parts, *conversions, "<h2>Run</h2>", notes))
    (folder / PAGE_NAME).write_text(html_page(page_title(results), body), encoding="utf-8")
    return tables
