"""Folders of adapters: the names in them, and what is said of one where a whole model is wanted."""

from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"
RUN_SETTINGS = "run_settings.json"  # in an output folder: what the run whose checkpoints lie there trains
MERGED = "merged"  # in an output folder: the whole model that `mha2mla train --merge` makes of the adapter there


def refuse_adapter(folder: Path, name: str, role: str) -> None:
    """Raise a `ValueError` if a folder, which `name` stands for, holds an adapter."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{role}: {name} holds an adapter ({ADAPTER_CONFIG}), which is no whole model. {merge_first(folder)}"
        )


def merge_first(folder: Path) -> str:
    """For a person: how an adapter becomes a whole model. `mha2mla train --merge` writes it into its output folder."""
    merged = folder / MERGED
    if (merged / "config.json").is_file():
        return f"Give {merged}, with which it was merged."
    if (folder / RUN_SETTINGS).is_file():
        command = "the command that trained it with `--resume_from_checkpoint true --merge`"
        return f"Merge it first: {command} writes {merged} (peft's merge_and_unload makes the same)."
    return "Merge it first (peft's merge_and_unload) and give what that saves."
