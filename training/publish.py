"""Uploading a checkpoint to the Hub: what goes, and everything in one commit."""

import io
import json
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

from mha2mla.common.adapters import ADAPTER_CONFIG, RUN_SETTINGS
from mha2mla.common.cards import CARD_NAME, RESULTS_FOLDER
from mha2mla.common.companions import COMPANION_PATTERNS, name_tokenizer
from mha2mla.common.exports import EXPORT_RECORD_NAME
from mha2mla.common.files import damage, read_json_object, read_text, shown
from mha2mla.common.hub import on_hub
from mha2mla.common.loading import find_file
from mha2mla.modeling import FAMILIES

# Of a checkpoint's own level. What a run leaves beside them (optimizer, random states, `training_args.bin`, which is a
# pickle, tracking, other checkpoints) is for going on with the run, not for users of the model.
PUBLISHED = [
    "*.safetensors",
    "*.json",
    "*.py",
    "*.md",
    "*.png",
    "*.html",
    *COMPANION_PATTERNS,
]
IN_FOLDERS = [f"{RESULTS_FOLDER}/*.yaml", *(pattern for pattern in COMPANION_PATTERNS if "/" in pattern)]
LEFT_OUT = ["trainer_state.json", "*_results.json", RUN_SETTINGS]


@dataclass(frozen=True)
class Upload:
    """
    Attributes:
        name (`str`): In the repository.
        content (`Path` or `bytes`): What it holds.
    """

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def operation(self) -> CommitOperationAdd:
        content = io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content
        return CommitOperationAdd(self.name, content)


def plan_upload(folder: Path, base_model: str | None = None, repo: str | None = None) -> list[Upload]:
    """
    The files of a converted or trained model, an adapter, a merged model or an export that go to the Hub.

    Args:
        folder (`Path`): Output of `mha2mla convert` or `mha2mla train`, one of its checkpoints, or its `merged`; or
            a folder of `mha2mla export`.
        base_model (`str`, *optional*): Adapter: the name on the Hub of the model that it belongs to, written into the
            uploaded copies of its config and card. The local files stay as they are.
        repo (`str`, *optional*): OWNER/NAME; the uploaded copy of the card loads the model by this name.

    Raises:
        ValueError: If the folder is not a complete checkpoint, nobody else could load it, or it is none of ours.
    """
    if not folder.is_dir():
        upload = f"It is a file: upload it by `hf upload {repo or 'OWNER/NAME'} {folder}`."
        raise ValueError(f"There is no folder {folder}. {upload if folder.is_file() else 'Check the path.'}")
    files = [
        path
        for path in shown(folder)
        if path.is_file()
        and any(fnmatch(path.name, pattern) for pattern in PUBLISHED)
        and not any(fnmatch(path.name, pattern) for pattern in LEFT_OUT)
    ]
    files += [path for pattern in IN_FOLDERS for path in shown(folder, pattern)]
    uploads = {name: Upload(name, path) for path in files for name in [path.relative_to(folder).as_posix()]}
    if not any(name.endswith(".safetensors") for name in uploads):
        raise ValueError(
            f"{folder} holds no .safetensors weights. Give the output of mha2mla convert, train or export."
        )
    for path in shown(folder, "*.safetensors"):
        if fault := damage(path):
            raise ValueError(f"{fault}. Save the model again.")
    if ADAPTER_CONFIG in uploads:
        config = read_json_object(folder / ADAPTER_CONFIG)
        base_model = str(base_model or config.get("base_model_name_or_path") or "")
        if not base_model:
            raise ValueError(
                f"{folder / ADAPTER_CONFIG} names no base model. Give its name on the Hub by --base-model."
            )
        check_converted(folder, str(config.get("base_model_name_or_path") or base_model), repo)
        if Path(base_model).exists():
            raise ValueError(
                f"{folder} is an adapter of {base_model}, a folder that nobody else has. Push that first and give its "
                "name with --base-model, or push the merged model (mha2mla train --merge)."
            )
        config["base_model_name_or_path"] = base_model
        uploads[ADAPTER_CONFIG] = Upload(ADAPTER_CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    elif base_model is not None:
        raise ValueError(f"--base-model belongs to adapters; {folder} holds a whole model.")
    else:
        check_model_files(folder, set(uploads))
        check_converted(folder, str(folder), repo)
    if CARD_NAME in uploads:
        text = read_text(folder / CARD_NAME)
        uploads[CARD_NAME] = Upload(CARD_NAME, published_card(text, repo, base_model).encode())
    return list(uploads.values())


def published_card(text: str, repo: str | None, base_model: str | None) -> str:
    """A card as it goes to the Hub: its code loads the model by the name that it has there, not by the folder's, and
    the card of an adapter names the model that it belongs to."""
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    if repo is not None and title is not None:
        text = text.replace(f'from_pretrained("{title[1]}"', f'from_pretrained("{repo}"')
    if base_model is not None and on_hub(base_model):
        card = ModelCard(text)
        card.data["base_model"], card.data["base_model_relation"] = base_model, "adapter"
        text = str(card)
    return text


def check_model_files(folder: Path, names: set[str]) -> None:
    """Raise a `ValueError` if a model lacks its config, or code or shards that its files name."""
    if "config.json" not in names:
        raise ValueError(f"{folder} holds no config.json: it is no complete checkpoint.")
    needed = named_files(folder)
    for code in shown(folder, "*.py"):
        needed |= {f"{name}.py" for name in re.findall(r"^from \.(\w+) import", read_text(code), re.MULTILINE)}
    missing = sorted(needed - names)
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, without which it does not load. Save it again.")


def check_converted(folder: Path, model: str, repo: str | None) -> None:
    """
    Raise a `ValueError` if what would go up was not made by this package.

    Args:
        model (`str`): The folder itself, or the base model of an adapter, which may be out of reach.
    """
    path = find_file(model, "config.json")
    if path is None:
        return
    model_type = read_json_object(path).get("model_type")
    if model_type not in FAMILIES and find_file(model, EXPORT_RECORD_NAME) is None:
        what = str(folder) if model == str(folder) else f"{folder} is an adapter of {model}, which"
        raise ValueError(
            f"{what} has model_type={model_type!r}: it is neither a converted model nor an export of one. Convert it "
            f"first (`mha2mla convert`), or upload it as it is by `hf upload {repo or 'OWNER/NAME'} {folder}`."
        )


def named_files(folder: Path) -> set[str]:
    """Code that a model's config names, and the files that its index names; a `ValueError` if these are malformed."""
    index = folder / "model.safetensors.index.json"
    try:
        named = read_json_object(folder / "config.json").get("auto_map", {}).values()
        # A tokenizer has two classes, of which one may be null; `OWNER/NAME--module.Class` lies elsewhere.
        classes = [each for entry in named for each in (entry if isinstance(entry, list) else [entry]) if each]
        files = {name.split(".")[0] + ".py" for name in classes if "--" not in name}
        return files | (set(read_json_object(index)["weight_map"].values()) if index.is_file() else set())
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"config.json or {index.name} of {folder} is malformed. Save the model again.") from None


def push_folder(
    folder: Path,
    repo: str,
    private: bool = False,
    base_model: str | None = None,
    message: str = "Upload by mha2mla",
    api: HfApi | None = None,
) -> str:
    """
    Upload a checkpoint in one commit, so that the repository never holds half of it.

    Args:
        folder (`Path`), base_model (`str`, *optional*): See [`plan_upload`].
        repo (`str`): OWNER/NAME; created if it is not there.
        private (`bool`): Whether a new repository is.
        api (`HfApi`, *optional*): Another endpoint or token than the environment's.

    Returns:
        Address of the commit.

    Raises:
        ValueError: As [`plan_upload`], before anything is sent.
    """
    uploads = plan_upload(folder, base_model, repo)
    api = api or HfApi()
    repo_id = api.create_repo(repo, private=private, exist_ok=True).repo_id
    operations = [upload.operation() for upload in uploads]
    return api.create_commit(repo_id, operations=operations, commit_message=message).commit_url


def missing_companions(uploads: list[Upload]) -> list[str]:
    """What users of a model look for beside its weights and would not find."""
    names = [upload.name for upload in uploads]
    absent = [] if name_tokenizer(names) else ["a tokenizer"]
    return absent + ([] if CARD_NAME in names else [f"a model card ({CARD_NAME})"])


def describe_upload(uploads: list[Upload]) -> str:
    """One line a file, sizes in bytes, and the sum."""
    lines = [f"{upload.size:>15,}  {upload.name}" for upload in uploads]
    return "\n".join([*lines, f"{sum(upload.size for upload in uploads):>15,}  bytes in {len(uploads)} files"])
