"""Chat with the original and its conversion side by side, with the bytes of their caches counting up.

    mha2mla chat ./my-llama my-llama-mla
    mha2mla chat meta-llama/Llama-3.1-8B-Instruct llama-mla --device cuda --prompt "Why is the sky blue?"

Both answer greedily, always with the likeliest token: there is no sampling. The tokenizer's chat template is used;
without one, they continue the text. An empty line or Ctrl-D ends. Where the terminal is narrow, or the output is no
terminal, one answers after the other.
"""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mha2mla.common.files import HALF_CHARACTER

from .columns import LEAST_WIDTH, Columns
from .parsing import COMPARED_MODELS, parse

if TYPE_CHECKING:  # it imports torch
    from mha2mla.evaluation.chat import Answer, Speaker


@dataclass
class ChatArguments:
    """What is said, and where it is computed."""

    prompt: str | None = field(default=None, metadata={"help": "Answer this, and end."})
    max_new_tokens: int = field(default=256, metadata={"help": "Most tokens of an answer."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Of weights and cache; auto: the checkpoint's."}
    )
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, cuda:1, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that models bring along."})

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1.")


def main(argv: list[str]) -> None:
    options, given = parse(argv, "mha2mla chat", ChatArguments, description=__doc__, positionals=COMPARED_MODELS)

    from mha2mla.common.device import check_device
    from mha2mla.common.loading import load_model, load_tokenizer
    from mha2mla.evaluation.chat import Speaker
    from mha2mla.evaluation.run import find_original

    check_device(options.device)
    original = find_original(given.models)
    paths = list(dict.fromkeys([*([original] if original else []), *given.models]))
    # Tokenizers first: what is not there is found before any weights are read.
    tokenizers = [load_tokenizer(path, trust_remote_code=options.trust_remote_code) for path in paths]
    speakers = []
    for path, tokenizer in zip(paths, tokenizers, strict=True):
        model = load_model(path, trust_remote_code=options.trust_remote_code, dtype=options.dtype)
        name = f"{path} (original)" if path == original and len(paths) > 1 else path
        speakers.append(Speaker(name, model.to(options.device).eval(), tokenizer))
    for prompt in prompts(options.prompt):
        if HALF_CHARACTER.search(prompt):
            raise ValueError(f"The prompt {prompt!r} holds what is no character. Is the terminal's encoding UTF-8?")
        show(speakers, prompt, options.max_new_tokens)


def prompts(given: str | None) -> Iterator[str]:
    """That of the command line, or what is typed."""
    if given is not None:
        yield given
        return
    while True:
        try:
            prompt = input("\n> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not prompt:
            return
        yield prompt


def show(speakers: list["Speaker"], prompt: str, max_new_tokens: int) -> None:
    """The answers, side by side if there is room for it."""
    from mha2mla.evaluation.chat import answer_together

    size = shutil.get_terminal_size()
    columns = Columns(sys.stdout, len(speakers), size.columns, size.lines)
    if not sys.stdout.isatty() or columns.width < LEAST_WIDTH:
        return show_plain(speakers, prompt, max_new_tokens)
    names = [speaker.name[-columns.width :] for speaker in speakers]
    rule = "─" * columns.width
    print(f"\n{columns.row(names)}\n{'─┼─'.join([rule] * len(names))}")
    for answers in answer_together(speakers, prompt, max_new_tokens):
        columns.draw([answer.text for answer in answers], [cache_line(answer, answers[0]) for answer in answers])


def show_plain(speakers: list["Speaker"], prompt: str, max_new_tokens: int) -> None:
    """One answer after the other, printed as it comes."""
    first: Answer | None = None
    for speaker in speakers:
        print(f"{speaker.name}:")
        shown, answer = "", None
        for answer in speaker.answer(prompt, max_new_tokens):
            if answer.text.startswith(shown):
                print(answer.text[len(shown) :], end="", flush=True)
                shown = answer.text
        assert answer is not None
        if answer.text != shown:  # a later token changed what had been printed
            print(f"\n{answer.text}", end="")
        first = first or answer
        print(f"\n[{cache_line(answer, first)}]\n")


def cache_line(answer: "Answer", original: "Answer") -> str:
    """For a person: what an answer's cache holds, and how much that is of the original's a token."""
    line = f"cache: {answer.cache_bytes:,} bytes"
    if answer is original:
        return line
    share = answer.cache_bytes / answer.cache_tokens / (original.cache_bytes / original.cache_tokens)
    return f"{line} ({100 * share:.2f} % per token)"
