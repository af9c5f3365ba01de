"""Checkpoints by their names: what a name means, and their configs, tokenizers, models and other files.

A name is a local folder, or OWNER/NAME on the Hub. Code that a checkpoint brings along runs only where the user has
said so (`trust_remote_code`).
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .adapters import refuse_adapter
from .companions import NOTICES, find_notices, has_tokenizer
from .errors import raised_in_package
from .exports import EXPORT_RECORD_NAME, without_warning_of_factor
from .files import check_readable
from .hub import check_on_hub, hub_trouble, in_cache, on_hub


def check_name(name: str, role: str) -> None:
    """
    Look at the name of a checkpoint, before anything is asked of the Hub.

    Args:
        role (`str`): What it is to be, for the message: "model", "teacher", "source".

    Raises:
        ValueError: If it is neither a folder nor of the form OWNER/NAME.
    """
    if Path(name).is_file():
        raise ValueError(f"{role}: {name!r} is a file. Give the folder in which config.json and the weights lie.")
    if not Path(name).is_dir() and not on_hub(name):
        raise ValueError(f"{role}: there is no folder {name!r}, and a name on the Hub has the form OWNER/NAME.")


def plain_path(name: str) -> str:
    """One spelling of a folder ("conv/" and "./conv" are "conv"); a name on the Hub stays as it is."""
    return str(Path(name)) if Path(name).is_dir() else name


def distinct_names(names: Iterable[str]) -> dict[str, str]:
    """What each checkpoint is called beside the others: the last part of its path or name, and as many before it as
    tell it from theirs ("a/merged" and "b/merged")."""
    parts = {name: Path(name).parts for name in names}
    short = {}
    for name, mine in parts.items():
        others = [theirs for other, theirs in parts.items() if other != name]
        sizes = (size for size in range(1, len(mine)) if all(theirs[-size:] != mine[-size:] for theirs in others))
        short[name] = str(Path(*mine[-next(sizes, len(mine)) :]))
    return short


def find_file(name: str, filename: str, revision: str | None = None) -> Path | None:
    """A file of a checkpoint that not every one has; from the Hub it is downloaded. None also where the Hub cannot be
    reached: for what a run can do without."""
    if not on_hub(name):
        path = Path(name) / filename
        return path if path.is_file() else None
    if not in_cache(name, filename, revision) and hub_trouble(name, filename, revision) is not None:
        return None
    try:
        return Path(hf_hub_download(name, filename, revision=revision))
    except (EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled):
        return None


def copy_notices(name: str, folder: Path) -> None:
    """Take licence, notice and policy of a checkpoint along, as most licences ask of whoever passes a model on."""
    if on_hub(name):
        try:
            name = snapshot_download(name, allow_patterns=list(NOTICES))
        except (HfHubHTTPError, OSError):  # the Hub cannot be reached, and nothing of it is here
            return
    for path in find_notices(Path(name)):
        shutil.copyfile(path, folder / path.name)


def head_dim(config: PreTrainedConfig) -> int:
    """Dimensions of an attention head; not every config says it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def keys_values_width(config: PreTrainedConfig) -> int:
    """Values of a token and layer in keys and values of all heads: what a source caches, also by the config of a model
    that was made of it."""
    return 2 * config.num_key_value_heads * head_dim(config)


@contextmanager
def loading(name: str, role: str, part: str, revision: str | None) -> Iterator[None]:
    """What libraries say of a checkpoint's part that they cannot load, in one sentence; nothing where there is no
    need."""
    check_name(name, role)
    check_on_hub(name, role, revision=revision)
    check_readable(Path(name))
    try:
        with without_warning_of_factor(lambda: find_file(name, EXPORT_RECORD_NAME, revision) is not None):
            yield
    except (OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise  # nothing is wrong with the checkpoint, or it is said already
    except Exception as error:
        if raised_in_package(error):
            raise
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{role}: {name} brings code of its own for its {part}, which would run on this machine. Read it, and "
                "allow it by --trust_remote_code."
            ) from error
        reason = shorten(str(error), 300, placeholder=" ...")
        if part == "config":
            raise ValueError(f"{role}: the config.json of {name} is not valid ({reason}). Mend it.") from error
        raise ValueError(f"{role}: the {part} of {name} cannot be loaded ({reason}).") from error


def load_config(
    name: str, role: str = "model", trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedConfig:
    """
    The config of a checkpoint.

    Args:
        name (`str`): A folder, or OWNER/NAME on the Hub.
        role (`str`): What the checkpoint is to be, for messages.
        trust_remote_code (`bool`): Whether code that the checkpoint brings along may run.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Raises:
        ValueError: If there is no such checkpoint, its config is malformed, or it needs code of its own.
    """
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        refuse_adapter(Path(name), name, role)
        raise ValueError(f"{role}: {name} has no config.json: it is not a transformers checkpoint.")
    with loading(name, role, "config", revision):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision or "main")


def check_router(config: PreTrainedConfig, name: str, role: str) -> None:
    """Raise a `ValueError` for experts that transformers runs otherwise than their config says: its DeepSeek-V2 does
    not renormalise the weights of the chosen ones. Our exports of Mixtral ask for it; DeepSeek's own models do not."""
    if isinstance(config, DeepseekV2Config) and config.norm_topk_prob:
        raise ValueError(
            f"{role}: {name} is a mixture of experts with norm_topk_prob=True, which transformers' DeepSeek-V2 "
            "ignores: it would give other text than engines do. Give the converted model that it was exported from."
        )


def load_tokenizer(
    name: str, role: str = "model", trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; arguments and errors as [`load_config`]'s, and one where it has none."""
    if Path(name).is_dir() and not has_tokenizer(Path(name)):
        raise ValueError(
            f"{role}: {name} has no tokenizer files. Copy them from the original, or save them: "
            "AutoTokenizer.from_pretrained(original).save_pretrained(folder)."
        )
    with loading(name, role, "tokenizer", revision):
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, revision=revision or "main"
        )
        tokenizer("text")  # malformed settings show only now
        return tokenizer


def load_model(
    name: str, role: str = "model", trust_remote_code: bool = False, revision: str | None = None, **options: Any
) -> PreTrainedModel:
    """The causal language model of a checkpoint; `options` are those of `from_pretrained`: dtype, ... Arguments and
    errors are otherwise [`load_config`]'s; weights that are not there, which transformers would draw at random, are an
    error too, and so is what [`check_router`] refuses."""
    check_router(load_config(name, role, trust_remote_code, revision), name, role)
    with loading(name, role, "weights", revision):
        model, found = AutoModelForCausalLM.from_pretrained(
            name,
            trust_remote_code=trust_remote_code,
            revision=revision or "main",
            output_loading_info=True,
            **options,
        )
    missing = sorted(found["missing_keys"])
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(f"{role}: {name} lacks the weights {missing[0]}{more}. Is the checkpoint complete?")
    check_rope_frequencies(model, name, role)
    return model


def check_rope_frequencies(model: PreTrainedModel, name: str, role: str) -> None:
    """Raise a `ValueError` if a layer of one of our models rotates with a frequency that there is not. Indices are
    weights of the checkpoint, and a wrong one ends in an error of the device that says nothing."""
    for key, indices in model.named_buffers():
        if key.endswith(".rope_frequencies"):
            most = head_dim(model.config) // 2
            wrong = indices[(indices < 0) | (indices >= most)].tolist()
            if wrong:
                raise ValueError(f"{role}: {key} of {name} has {wrong[0]}, and there are frequencies 0 to {most - 1}.")
