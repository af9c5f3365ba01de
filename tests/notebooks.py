"""
Runs a notebook without Jupyter, cell after cell: Python in one namespace without showing anything, and `%%bash` cells
as bash.

    cd docs/examples && MODEL=./my-llama PROSE=texts.jsonl DATA=texts.jsonl python ../../tests/notebooks.py gpu.ipynb

A second name is that of the notebook to write, with what its cells printed.
"""

import contextlib
import io
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


def run_cell(cell: str, names: dict[str, Any]) -> str:
    """Gives what it prints, and prints it."""
    if not cell.startswith(BASH):
        text = io.StringIO()
        try:
            with contextlib.redirect_stdout(text):
                exec(re.sub("^%.*$", "", cell, flags=re.MULTILINE), names)
        finally:
            print(text.getvalue(), end="")
        return text.getvalue()
    command = ["bash", "-c", cell.removeprefix(BASH)]
    printed = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as bash:
        # a bar of progress is one line, with its states between carriage returns
        for line in map(bytes.decode, bash.stdout or ()):
            print(line, end="", flush=True)
            printed += line.rstrip("\r\n").rpartition("\r")[2] + "\n"
    if bash.returncode != 0:
        raise subprocess.CalledProcessError(bash.returncode, command, printed)
    return printed


def run_notebook(notebook: Path, output: Path | None = None) -> dict[str, Any]:
    """Gives the names that its Python cells leave; with `output`, writes the notebook, as far as it came."""
    names: dict[str, Any] = {"display": lambda *_: None}
    content = json.loads(notebook.read_text(encoding="utf-8"))
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    for count, cell in enumerate(cells, start=1):
        text = run_cell("".join(cell["source"]), names)
        stream = dict(output_type="stream", name="stdout", text=text.splitlines(keepends=True))
        cell.update(execution_count=count, outputs=[stream] if text else [])
        if output is not None:
            output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return names


if __name__ == "__main__":
    run_notebook(*map(Path, sys.argv[1:]))
