"""A tokenizer that travels to a model of another type and gives the same tokens there.

`AutoTokenizer` picks a class by the config's `model_type`, by a list of types whose declared class it takes for
wrong, and by what the files declare, differently in each version of transformers; some classes rebuild the tokenizer
from its vocabulary and ignore the rest of `tokenizer.json`. The same files can therefore mean other tokens once
`model_type` is another. What does not depend on any of this is a `tokenizer.json` that holds the tokenizer as it was
loaded, with the generic class `PreTrainedTokenizerFast` declared for it.
"""

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .companions import copy_companions, has_tokenizer
from .files import read_json_object
from .loading import load_tokenizer

logger = logging.getLogger(__name__)

CONFIG_NAME = "tokenizer_config.json"

# What a tokenizer's class decides where its settings are silent: Llama's pads on the left, for one.
CLASS_DEFAULTS = ("padding_side", "truncation_side", "model_input_names", "clean_up_tokenization_spaces")

# What tokenizers disagree on when they are not the same.
SAMPLES = (
    "Hello, world! We need to add 9 and 6: 1234567890, 3.14, 1,000,000.",
    " two  spaces,   three,        eight \t a tab\t\t and trailing ones   ",
    "lines\n\n\nand\r\nreturns\n",
    "don't  DON'T they'll naïve déjà vu, Ångström, e\u0301",
    "日本語と漢字、中文，한국어 Кириллица العربية עברית हिन्दी",  # noqa: RUF001
    "😀👍🏽👩\u200d👩\u200d👧 ∑∫√ ﬁ ½ \u00a0\u200b",
    "def f(x):\n    return {'a': [x**2 for _ in range(10)]}  # code\n",
    "",
)
MESSAGES = (
    {"role": "user", "content": "How many r are there in 'strawberry'?"},
    {"role": "assistant", "content": "Three:  st**r**awbe**rr**y.\n"},
    {"role": "user", "content": "  And in 草莓? 🍓"},
)


class TokensDiffer(ValueError):
    """Two tokenizers are not the same."""


def has_own_code(folder: Path) -> bool:
    """Whether a folder's tokenizer is a class of its own, loaded with `trust_remote_code`."""
    path = folder / CONFIG_NAME
    return path.is_file() and "AutoTokenizer" in read_json_object(path).get("auto_map", {})


def write_tokenizer(source: Path, output: Path, trust_remote_code: bool = False) -> None:
    """
    Give a checkpoint the tokenizer of another, and prove that both folders give the same tokens.

    Args:
        source (`Path`): Folder of the checkpoint whose tokenizer it is.
        output (`Path`): Folder that has its config.json and the companions of the source already.
        trust_remote_code (`bool`): Whether the tokenizer's own code, if it has any, may be run. Without it such a
            tokenizer is copied and not proved.

    Raises:
        ValueError: If the tokens differ, with the first text on which they do.
    """
    if not has_tokenizer(source):
        logger.warning("%s has no tokenizer; %s has none either.", source, output.name)
        return
    if has_own_code(source):
        if not trust_remote_code:
            logger.warning(
                "The tokenizer of %s has code of its own, which was copied and not run: that it gives the same tokens "
                "was not checked. --trust-remote-code does it.",
                source,
            )
            return
    else:
        tokenizer = load_tokenizer(str(source), "source")
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            save_generic(tokenizer, output)
            try:
                return check_same_tokens(source, output)
            except TokensDiffer:  # its class does more than tokenizer.json says, as CodeLlama's, which fills in
                copy_companions(source, output)
    check_same_tokens(source, output, trust_remote_code)


def save_generic(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a tokenizer so that every version of transformers loads it as it is, whatever the config's `model_type`."""
    tokenizer.save_pretrained(folder)
    path = folder / CONFIG_NAME
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings |= {name: getattr(tokenizer, name) for name in CLASS_DEFAULTS}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def token_ids(tokenizer: PreTrainedTokenizerBase, added: Iterable[str] = ()) -> dict[str, list[int]]:
    """Ids of a fixed set of texts, with and without special tokens, of those and the added tokens that are given, and
    of a chat in the tokenizer's template."""
    special = " ".join(dict.fromkeys([*sorted(tokenizer.all_special_tokens), *added]))
    ids: dict[str, list[int]] = {}
    for text in (*SAMPLES, special, f"a{special}b"):
        ids[text] = tokenizer(text)["input_ids"]
        ids[f"{text} (no special tokens added)"] = tokenizer(text, add_special_tokens=False)["input_ids"]
    templates = tokenizer.chat_template
    for name in templates if isinstance(templates, dict) else [] if templates is None else [None]:
        for prompt in (False, True):
            title = f"a chat in template {name or 'default'}, generation prompt {prompt}"
            try:
                ids[title] = tokenizer.apply_chat_template(
                    list(MESSAGES), chat_template=name, add_generation_prompt=prompt, tokenize=True, return_dict=True
                )["input_ids"]
            except TemplateError:  # it wants tools or documents
                ids[title] = []
    return ids


def check_same_tokens(source: Path, output: Path, trust_remote_code: bool = False) -> None:
    """Raise a `ValueError` with the first text of which `AutoTokenizer` makes other ids from one folder than from the
    other, or with what else they do otherwise."""
    first = load_tokenizer(str(source), "source", trust_remote_code)
    second = load_tokenizer(str(output), "output", trust_remote_code)
    added = sorted({*first.get_added_vocab(), *second.get_added_vocab()})
    try:
        wanted, got = token_ids(first, added), token_ids(second, added)
    except Exception as error:  # whatever malformed settings make of a tokenizer
        raise ValueError(f"The tokenizer of {source} fails on text ({error}). Mend its {CONFIG_NAME}.") from error
    for text, ids in wanted.items():
        if got.get(text) != ids:
            raise TokensDiffer(
                f"The tokenizer of the output gives other tokens than that of {source}: {text!r:.80} is {ids[:12]} "
                f"there and {got.get(text, [])[:12]} here ({type(first).__name__}, {type(second).__name__}). Nothing "
                "was written. Please report the source's name."
            )
    for ids in wanted.values():
        if first.decode(ids) != second.decode(ids):
            raise TokensDiffer(f"The tokenizer of the output decodes {ids[:12]} otherwise than that of {source}.")
    for name in CLASS_DEFAULTS:
        theirs, ours = getattr(first, name), getattr(second, name)
        if ours != theirs:
            raise TokensDiffer(f"The tokenizer of the output has {name}={ours!r}, that of {source} {theirs!r}.")


def check_known(what: str, largest: int, vocab_size: int) -> None:
    """Raise a `ValueError` if the largest token id of `what` is beyond the model's embedding, which a GPU would not
    name."""
    if largest >= vocab_size:
        raise ValueError(
            f"{what} has a token with the id {largest}, and the model knows vocab_size={vocab_size} tokens. Was one "
            "added to the tokenizer without model.resize_token_embeddings? Mend the model, or give other text."
        )
