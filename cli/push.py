"""Upload a checkpoint to the Hub: a converted or trained model, an adapter, a merged model or an export.

    mha2mla push llama-mla-recovered my-name/llama-mla --dry-run
    mha2mla push llama-mla-recovered my-name/llama-mla --private
    mha2mla push llama-mla-lora my-name/llama-mla-lora --base-model my-name/llama-mla

Weights, config, code, tokenizer and model card go up in one commit; what belongs to the training run stays here. Log
in with `hf auth login`, or set HF_TOKEN.
"""

from dataclasses import dataclass, field
from pathlib import Path

from .parsing import Positionals, parse

POSITIONALS: Positionals = {
    "folder": dict(type=Path, help="Output of convert, train or export, a checkpoint-N, or OUTPUT/merged."),
    "repo": dict(help="OWNER/NAME on the Hub; created if it is not there."),
}


@dataclass
class PushArguments:
    """What goes up, and how."""

    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    base_model: str | None = field(
        default=None, metadata={"help": "Adapter: the name on the Hub of the model that it belongs to."}
    )
    dry_run: bool = field(default=False, metadata={"help": "List what would be uploaded, and upload nothing."})


def main(argv: list[str]) -> None:
    options, given = parse(argv, "mha2mla push", PushArguments, description=__doc__, positionals=POSITIONALS)

    from mha2mla.common.hub import is_hub_name
    from mha2mla.training.publish import describe_upload, missing_companions, plan_upload, push_folder

    if not is_hub_name(given.repo):
        raise ValueError(f"{given.repo!r} is no name on the Hub, which has the form OWNER/NAME.")
    uploads = plan_upload(given.folder, options.base_model, given.repo)
    print(describe_upload(uploads))
    if absent := missing_companions(uploads):
        print(f"Without {' and without '.join(absent)}, which users look for: save what there is in {given.folder}.")
    if not options.dry_run:
        print(push_folder(given.folder, given.repo, options.private, options.base_model))
