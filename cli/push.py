"""Upload a checkpoint to the Hub: a converted or trained model, an adapter, or a merged model.

    mha2mla push llama-mla-recovered my-name/llama-mla --dry-run
    mha2mla push llama-mla-recovered my-name/llama-mla --private
    mha2mla push llama-mla-lora my-name/llama-mla-lora --base-model my-name/llama-mla

Weights, config, code, tokenizer and model card go up in one commit; what belongs to the training run stays here. Log
in with `hf auth login`, or set HF_TOKEN.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from mha2mla.training.publish import describe_upload, plan_upload, push_folder


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="mha2mla push", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Output of convert or train, a checkpoint-N, or OUTPUT_DIR/merged.")
    parser.add_argument("repo", help="OWNER/NAME on the Hub; created if it is not there.")
    parser.add_argument("--private", action="store_true", help="Make a new repository private.")
    parser.add_argument("--base-model", help="Adapter: the name on the Hub of the model that it belongs to.")
    parser.add_argument("--dry-run", action="store_true", help="List what would be uploaded, and upload nothing.")
    args = parser.parse_args(argv)
    uploads = plan_upload(args.folder, args.base_model, args.repo)
    print(describe_upload(uploads))
    if not args.dry_run:
        print(push_folder(args.folder, args.repo, args.private, args.base_model))
