"""User pages and notebooks are right: commands parse, what runs offline runs, names import, links lead somewhere."""

import ast
import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from conftest import pico_tokenizer
from transformers import AutoModelForCausalLM

from mha2mla.cli.main import COMMANDS, main
from mha2mla.cli.parsing import CommandParser
from notebooks import BASH, code_cells, run_notebook
from pico import SOURCES

REPOSITORY = Path(__file__).parents[1]
README = REPOSITORY / "README.md"
USER_PAGES = sorted((REPOSITORY / "docs").glob("*.md"))
PAGES = [README, REPOSITORY / "CONTRIBUTING.md", *USER_PAGES, *sorted((REPOSITORY / "docs" / "dev").glob("*.md"))]
EXAMPLES = REPOSITORY / "docs" / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
CODE = ("cli", "common", "conversion", "training")
HERE = "https://github.com/mha2mla/mha2mla/"


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of a page's fenced blocks, in their order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[list[str]]:
    """The words of each `mha2mla` command of a block of bash, also of those that `accelerate launch` starts."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "mha2mla.cli.main" in words:
            words = ["mha2mla", *words[words.index("mha2mla.cli.main") + 1 :]]
        if words[:1] == ["mha2mla"]:
            found.append(words[1:])
    return found


BASH_BLOCKS = [
    *((page, REPOSITORY, block) for page in [README, *USER_PAGES] for lang, block in blocks(page) if lang == "bash"),
    *((page, EXAMPLES, cell) for page in NOTEBOOKS for cell in code_cells(page) if cell.startswith(BASH)),
]
USER_COMMANDS = [
    pytest.param(words, folder, id=f"{name_of(page)}: {' '.join(words)[:60]}")
    for page, folder, block in BASH_BLOCKS
    for words in commands(block)
]
SNIPPETS = [
    pytest.param(block, id=f"{name_of(page)}: {block.splitlines()[0]}")
    for page in [README, *USER_PAGES]
    for language, block in blocks(page)
    if language == "python"
]


class Parsed(Exception):
    """Ends a command when its options are read."""


@pytest.mark.parametrize("words, folder", USER_COMMANDS)
def test_commands_parse(words, folder, monkeypatch):
    assert words[0] in COMMANDS
    parse = CommandParser.parse

    def parse_only(parser, argv):
        parse(parser, argv)
        raise Parsed

    monkeypatch.setattr(CommandParser, "parse", parse_only)
    monkeypatch.chdir(folder)  # where the recipes are
    here = ["--use_cpu"] if words[0] == "train" else []  # the recipe's --bf16 asks for a GPU
    with pytest.raises(Parsed):
        import_module(f"mha2mla.cli.{words[0]}").main([*words[1:], *here])


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_import_what_is_there(snippet):
    for node in ast.walk(ast.parse(snippet)):
        if isinstance(node, ast.ImportFrom):
            module = pytest.importorskip(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                pytest.importorskip(alias.name)


@pytest.fixture
def pico_for_smollm(tmp_path, monkeypatch):
    """A pico model where `demo.py` leaves the original, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    source = Path(".cache/SmolLM2-135M-Instruct")
    config = type(SOURCES["gqa"])(**{**SOURCES["gqa"].to_dict(), "max_position_embeddings": 1024})
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    pico_tokenizer().save_pretrained(source)


def test_the_quick_start_runs_as_written(pico_for_smollm):
    """Every `mha2mla` command and Python snippet in the order of the page."""
    for language, block in blocks(REPOSITORY / "docs" / "quickstart.md"):
        if language == "python":
            exec(block, {})
        for words in commands(block) if language == "bash" else ():
            if "HuggingFaceTB" not in " ".join(words):
                assert main(words) == 0, words
    assert Path("smollm2-deepseek/config.json").is_file()


def test_the_notebook_runs_as_written(pico_for_smollm, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    run_notebook(EXAMPLES / "quickstart.ipynb")
    assert "DeepseekV3ForCausalLM writes the same" in capsys.readouterr().out


def test_the_space_answers_without_its_page(pico_for_smollm, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    space = import_module("space")
    pair = space.Pair(*map(str, space.demo_models()))
    shown = list(pair.answer("w5 w6", 4))[-1]
    assert pair.titles == ["Original: SmolLM2-135M-Instruct", "Converted: SmolLM2-135M-Instruct-MLA-calibrated"]
    assert len(shown) == 4 and shown[3].endswith("(31.25 % per token)")


def test_the_notebook_shows_a_whole_run():
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert {output["output_type"] for cell in code for output in cell["outputs"]} <= {"stream", "display_data"}


@pytest.mark.parametrize("page", [README, *USER_PAGES], ids=name_of)
def test_pages_are_short(page):
    assert len(page.read_text(encoding="utf-8").split()) <= (600 if page == README else 800)


def message(node: ast.AST) -> str | None:
    """A string of the code, with "…" for what is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


def test_the_messages_of_troubleshooting_are_the_codes_own():
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    assert len(headings) == 12
    files = [path for folder in CODE for path in (REPOSITORY / folder).rglob("*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    said = [text for tree in trees for node in ast.walk(tree) if (text := message(node)) is not None]
    for heading in headings:
        words = heading.removesuffix("…")
        assert any(words in text for text in said), heading


def anchor(heading: str) -> str:
    """As GitHub and the site make it of a heading."""
    text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", text))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        for start in ("blob/main/", "tree/main/"):
            link = link.replace(HERE + start, f"{REPOSITORY}/")
        if link.startswith("http"):
            continue
        path, _, fragment = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if fragment and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert fragment in map(anchor, headings), link
            assert "--" not in fragment, (
                f"{link}: the site has one dash where GitHub has two. Name the heading otherwise."
            )
