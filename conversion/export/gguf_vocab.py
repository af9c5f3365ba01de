"""The tokenizer of a GGUF file, from `tokenizer.json`."""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

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


def pre_tokenizer_name(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for the pre-tokenizer of a byte-level `tokenizer.json`; None for one that it may not have."""
    pre = tokenizer.get("pre_tokenizer") or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    patterns: list[str] = []
    digits = False
    for step in steps:
        if step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append(step["pattern"].get("Regex"))
        elif step.get("type") == "Digits":
            digits = step["individual_digits"]
        elif step.get("type") != "ByteLevel":
            return None
    return PRE_TOKENIZERS.get((tuple(patterns), digits))


def sentencepiece_scores(tokenizer: dict[str, Any], tokens: list[str]) -> list[float]:
    """Scores by which llama.cpp's sentencepiece merges in the order of the byte pairs: minus the pair's place."""
    place: dict[str, int] = {}
    for index, merge in enumerate(tokenizer["model"]["merges"]):
        place.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), index)
    return [-float(place.get(token, len(place))) for token in tokens]


def add_vocabulary(writer, folder: Path, vocab_size: int) -> None:
    """
    Tokens, merges, special tokens and chat template.

    Raises:
        ValueError: If llama.cpp has no tokenizer that is known to do the same.
    """
    import gguf

    path = folder / "tokenizer.json"
    if not path.is_file():
        logger.warning("%s has no tokenizer.json; the file has no tokenizer either.", folder)
        writer.add_tokenizer_model("none")
        return
    description = json.loads(path.read_text())
    model = description["model"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens, kinds = list_tokens(tokenizer, description, vocab_size)
    pre = pre_tokenizer_name(description)
    if model["type"] == "BPE" and model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(sentencepiece_scores(description, tokens))
    elif model["type"] == "BPE" and pre is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
    else:
        raise ValueError(
            f"{path} is a {model['type']} tokenizer that cuts text in a way that is not known of llama.cpp; known are "
            f"{', '.join(PRE_TOKENIZERS.values())} and sentencepiece. Export with --format deepseek-v3."
        )
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special = gguf.SpecialVocab(folder, load_merges=not model.get("byte_fallback"), n_vocab=vocab_size)
    special.chat_template = special.chat_template or getattr(tokenizer, "chat_template", None)
    special.add_to_gguf(writer, quiet=True)


def list_tokens(tokenizer, description: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and llama.cpp's type of every row of the embedding."""
    from gguf import TokenType

    tokens = [f"[UNUSED{index}]" for index in range(vocab_size)]
    kinds = [int(TokenType.UNUSED)] * vocab_size
    for text, index in tokenizer.get_vocab().items():
        tokens[index] = text
        is_byte = description["model"].get("byte_fallback") and len(text) == 6 and text.startswith("<0x")
        kinds[index] = int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for added in description.get("added_tokens", []):
        kinds[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    return tokens, kinds
