"""The tokenizer of a GGUF file, from `tokenizer.json`."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mha2mla.common.files import read_json_object
from mha2mla.common.loading import load_tokenizer

logger = logging.getLogger(__name__)

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's name for a way of cutting text before byte pairs are merged: patterns, and whether digits stand alone.
PRE_TOKENIZERS = {
    ((), False): "gpt-2",
    ((), True): "smollm",
    ((CONTRACTIONS + r"\p{N}{1,3}" + REST,), False): "llama-bpe",
    ((CONTRACTIONS + r"\p{N}" + REST,), False): "qwen2",
}
INSTEAD = "Export with --format deepseek-v3."


def steps_of(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a normaliser or pre-tokenizer, alone or in a sequence, under `name`."""
    if part is None:
        return []
    return part[name] if part["type"] == "Sequence" else [part]


def pre_tokenizer_name(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for the pre-tokenizer of a byte-level `tokenizer.json`; None for one that it may not have."""
    patterns: list[str] = []
    digits, cuts_itself = False, None
    for step in steps_of(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            patterns.append(step["pattern"].get("Regex"))
        elif step["type"] == "Digits":
            digits = step["individual_digits"]
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            cuts_itself = step.get("use_regex", True)
        else:
            return None
    if cuts_itself is not (not patterns):  # by gpt-2's pattern, where there is no other
        return None
    return PRE_TOKENIZERS.get((tuple(patterns), digits))


def check_byte_level(tokenizer: dict[str, Any], path: Path) -> str:
    """
    llama.cpp's name for the pre-tokenizer of a byte-level tokenizer.

    Raises:
        ValueError: If llama.cpp is not known to do the same.
    """
    others = [step["type"] for step in steps_of(tokenizer.get("normalizer"), "normalizers") if step["type"] != "NFC"]
    if others:
        raise ValueError(f"{path} has the normaliser {others[0]}, which llama.cpp has not. {INSTEAD}")
    name = pre_tokenizer_name(tokenizer)
    if tokenizer["model"]["type"] != "BPE" or name is None:
        raise ValueError(
            f"{path} is a {tokenizer['model']['type']} tokenizer that cuts text in a way that is not known of "
            f"llama.cpp; known are {', '.join(PRE_TOKENIZERS.values())} and sentencepiece. {INSTEAD}"
        )
    return name


def has_space_prefix(tokenizer: dict[str, Any], path: Path) -> bool:
    """
    Whether a tokenizer like sentencepiece's puts a space before text.

    Raises:
        ValueError: If it has other steps than those that make spaces "▁", by which llama.cpp's gives other tokens.
    """
    prefix = spaces = False
    for step in steps_of(tokenizer.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == "▁":
            prefix = True
        elif step["type"] == "Replace" and (step["pattern"], step["content"]) == ({"String": " "}, "▁"):
            spaces = True
        else:
            raise ValueError(f"{path} has the normaliser {step}, which llama.cpp's sentencepiece has not. {INSTEAD}")
    for step in steps_of(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] != "Metaspace" or step["replacement"] != "▁" or step.get("split", True):
            raise ValueError(
                f"{path} has the pre-tokenizer {step}, which llama.cpp's sentencepiece has not; known is Metaspace "
                f"with split=false. {INSTEAD}"
            )
        spaces = True
        if step["prepend_scheme"] != "never":
            prefix = True
            where = " or stands behind a special token" if step["prepend_scheme"] == "first" else ""
            logger.warning("llama.cpp puts one more space before text that begins with a space%s.", where)
    if not spaces:
        raise ValueError(f'{path} leaves spaces as they are, and llama.cpp\'s sentencepiece makes them "▁". {INSTEAD}')
    return prefix


def sentencepiece_scores(tokenizer: dict[str, Any], tokens: list[str]) -> list[float]:
    """Scores by which llama.cpp's sentencepiece merges in the order of the byte pairs: minus the pair's place."""
    place: dict[str, int] = {}
    for index, merge in enumerate(tokenizer["model"]["merges"]):
        place.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), index)
    return [-float(place.get(token, len(place))) for token in tokens]


@dataclass(frozen=True)
class Vocabulary:
    """
    A tokenizer that llama.cpp has.

    Attributes:
        tokens (`list[str]`): Text of every row of the embedding.
        kinds (`list[int]`): llama.cpp's type of each.
        pre (`str`, *optional*): Its name for the pre-tokenizer; None for one like sentencepiece's.
        space_prefix (`bool`): Whether a space is put before text; byte-level ones do not.
        chat_template (`str`, *optional*): The tokenizer's own.
    """

    folder: Path
    description: dict[str, Any]
    tokens: list[str]
    kinds: list[int]
    pre: str | None
    space_prefix: bool
    chat_template: str | None


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary | None:
    """
    The tokenizer of a checkpoint, None if it has no tokenizer.json.

    Raises:
        ValueError: If llama.cpp has no tokenizer that is known to do the same, or the embedding has too few rows.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        logger.warning("%s has no tokenizer.json; the file has no tokenizer either.", folder)
        return None
    tokenizer = load_tokenizer(str(folder))
    description = read_json_object(path)
    if description["model"]["type"] == "BPE" and description["model"].get("byte_fallback"):
        pre, space_prefix = None, has_space_prefix(description, path)
    else:
        pre, space_prefix = check_byte_level(description, path), False
    tokens, kinds = list_tokens(tokenizer, description, vocab_size, path)
    template = getattr(tokenizer, "chat_template", None)
    return Vocabulary(folder, description, tokens, kinds, pre, space_prefix, template)


def add_vocabulary(writer, vocabulary: Vocabulary | None) -> None:
    """Tokens, merges, special tokens and chat template."""
    import gguf

    if vocabulary is None:
        writer.add_tokenizer_model("none")
        return
    if vocabulary.pre is None:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(sentencepiece_scores(vocabulary.description, vocabulary.tokens))
        writer.add_add_space_prefix(vocabulary.space_prefix)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    merges, size = vocabulary.pre is not None, len(vocabulary.tokens)
    special = gguf.SpecialVocab(vocabulary.folder, load_merges=merges, n_vocab=size)
    special.chat_template = special.chat_template or vocabulary.chat_template
    special.add_to_gguf(writer, quiet=True)


def list_tokens(tokenizer, description: dict[str, Any], vocab_size: int, path: Path) -> tuple[list[str], list[int]]:
    """Text and llama.cpp's type of every row of the embedding. Added tokens behind its last row, which the model
    cannot read either, are left out."""
    from gguf import TokenType

    tokens = [f"[UNUSED{index}]" for index in range(vocab_size)]
    kinds = [int(TokenType.UNUSED)] * vocab_size
    added = {token["id"]: token for token in description.get("added_tokens", [])}
    left_out = []
    for text, index in tokenizer.get_vocab().items():
        if index < vocab_size:
            tokens[index] = text
            is_byte = description["model"].get("byte_fallback") and len(text) == 6 and text.startswith("<0x")
            kinds[index] = int(TokenType.BYTE if is_byte else TokenType.NORMAL)
        elif index in added or text in tokenizer.get_added_vocab():
            left_out.append(text)
        else:
            raise ValueError(
                f"{path} has the token {text!r} of index {index}, and the model's embedding has vocab_size="
                f"{vocab_size} rows: it is another model's. Put the model's own tokenizer there."
            )
    if left_out:
        logger.warning(
            "The file is without the tokens %s of %s, for which the embedding (vocab_size=%d) has no rows.",
            ", ".join(map(repr, left_out)),
            path,
            vocab_size,
        )
    for index, token in added.items():
        if index < vocab_size:
            kinds[index] = int(TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
    return tokens, kinds
