"""The files beside a checkpoint's weights that its users need: tokenizer, chat templates, licence."""

import re
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from .files import shown


def in_any_case(pattern: str) -> str:
    """A pattern of file names that matches them in upper and lower case: for folders and for the Hub."""
    return "".join(f"[{letter.upper()}{letter.lower()}]" if letter.isalpha() else letter for letter in pattern)


# What may be done with a checkpoint.
NOTICES = tuple(map(in_any_case, ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")))
# Of tokenizers, by which AutoTokenizer finds one.
TOKENIZERS = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "tekken.json",
)
# Downloaded with a source and taken over as they are, subfolders included.
COMPANION_PATTERNS = [
    *NOTICES,
    "generation_config.json",
    *TOKENIZERS,
    "tokenization_*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
]


def name_tokenizer(files: Iterable[str]) -> bool:
    """Whether any tokenizer's files are among these, by their names."""
    return any(fnmatch(file, pattern) for file in files for pattern in TOKENIZERS)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds any tokenizer's files."""
    return name_tokenizer(path.name for path in shown(folder))


def find_notices(folder: Path) -> list[Path]:
    """Licence, notice and policy that lie in a folder."""
    return sorted(path for pattern in NOTICES for path in folder.glob(pattern) if path.is_file())


def find_companions(folder: Path) -> list[Path]:
    """The companions in a folder, relative to it, with the modules that a tokenizer's own code imports."""
    found = {path.relative_to(folder) for pattern in COMPANION_PATTERNS for path in shown(folder, pattern)}
    queue = [path for path in found if path.suffix == ".py"]
    while queue:
        code = (folder / queue.pop()).read_text(encoding="utf-8")
        for name in re.findall(r"^\s*from \.(\w+) import", code, re.MULTILINE):
            sibling = Path(f"{name}.py")
            if sibling not in found and (folder / sibling).is_file():
                found.add(sibling)
                queue.append(sibling)
    return sorted(path for path in found if (folder / path).is_file())


def copy_companions(folder: Path, output: Path) -> list[Path]:
    """Copy them as they are; returns what was copied, relative to both folders."""
    companions = find_companions(folder)
    for path in companions:
        (output / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / path, output / path)
    return companions
