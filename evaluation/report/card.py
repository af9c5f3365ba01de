"""An evaluation in the model cards of its conversions."""

import logging
import re
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from mha2mla.common.cards import CARD_NAME
from mha2mla.common.outputs import own_files
from mha2mla.evaluation.results import ORIGINAL, Results

from .conversion import conversion_figures, find_records
from .every_table import make_tables
from .figures import against_cache, encode_png
from .headline import unread
from .page import made_by

logger = logging.getLogger(__name__)

HEADING = "## Evaluation\n"
SECTION = re.compile(r"^## Evaluation\n.*?(?=^## |^\[mha2mla\]: |\Z)", re.MULTILINE | re.DOTALL)
BEFORE = re.compile(r"^## (Recipe|Training)\n|^\[mha2mla\]: |\Z", re.MULTILINE)


def write_cards(results: Results) -> None:
    """Put the tables of each conversion and its original, and the pictures of quality against cache size, into the
    conversion's model card, and all of its pictures into its folder. Only folders of this machine are written to."""
    for path, record in find_records(model.path for model in results.models).items():
        folder, card = Path(path), Path(path) / CARD_NAME
        if not card.is_file():
            logger.info("%s has no %s, left as it is", folder, CARD_NAME)
            continue
        shown = [save(folder, name, figure) for name, figure in against_cache(results)]
        saved = [save(folder, name, figure) for name, figure in conversion_figures(record)]
        own_files(folder, [*shown, *saved])
        own = replace(results, models=[m for m in results.models if m.preset == ORIGINAL or m.path == path])
        tables = [*(table.markdown() for table in make_tables(own)), *unread(own)]
        pictures = [f"![{Path(name).stem} against cache size]({name})" for name in shown]
        section = "\n\n".join([HEADING.strip(), *pictures, *tables, made_by(results)]) + "\n\n"
        card.write_text(insert_section(card.read_text(encoding="utf-8"), section), encoding="utf-8")
        logger.info("Wrote %s", card)


def save(folder: Path, name: str, figure: Figure) -> str:
    """Write a picture; gives its name."""
    file = folder / (re.sub(r"[^\w.-]+", "-", name) + ".png")
    file.write_bytes(encode_png(figure))
    return file.name


def insert_section(card: str, section: str) -> str:
    """The card with the section in place of an earlier one, or else before the recipe."""
    if SECTION.search(card):
        return SECTION.sub(lambda _: section, card, count=1)
    return BEFORE.sub(lambda found: section + found[0], card, count=1)
