"""
Runs a notebook without Jupyter, cell after cell: Python in one namespace without showing anything, and `%%bash` cells
as bash.

    cd docs/examples && MODEL=./my-llama PROSE=texts.jsonl DATA=texts.jsonl python ../../tests/notebooks.py gpu.ipynb
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

BASH = "%%bash\n"


def code_cells(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_notebook(notebook: Path) -> dict[str, Any]:
    """Gives the names that its Python cells leave."""
    names: dict[str, Any] = {"display": lambda *_: None}
    for cell in code_cells(notebook):
        if cell.startswith(BASH):
            subprocess.run(["bash", "-c", cell.removeprefix(BASH)], check=True)
        else:
            exec(re.sub("^%.*$", "", cell, flags=re.MULTILINE), names)
    return names


if __name__ == "__main__":
    run_notebook(Path(sys.argv[1]))
