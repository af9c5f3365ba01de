"""The README.md of a converted checkpoint."""

from pathlib import Path

from mha2mla.common.cards import card_metadata, fine_tuning, table, usage, write_card
from mha2mla.common.text_sources import hub_datasets
from mha2mla.common.versions import made_with
from mha2mla.modeling.latent_config import LatentConfigMixin

from .cache_plan import CachePlan
from .config import ConversionConfig

BODY = """{source_sentence} whose attention has been converted to Multi-head Latent Attention (MLA) with
[mha2mla]: its cache holds **{width} values per token and layer instead of {source_width}
({percent:+.2f} %)**.

{note}

{usage}

It needs transformers >= 5.17 and nothing else; `generate` picks the latent cache by itself.

{fine_tuning}

## Recipe

{recipe}

`conversion.json` holds everything needed to repeat it, the frequencies that kept RoPE in each layer included."""


def write_model_card(
    path: Path,
    source: str,
    source_is_repo: bool,
    repo: str,
    options: ConversionConfig,
    plan: CachePlan,
    config: LatentConfigMixin,
    revision: str | None = None,
) -> None:
    """Write the card of a model of this config; `source` is its base model only if it is a repository on the Hub."""
    rows = {
        "Source": source,
        "Preset": options.preset.name,
        "kv_lora_rank": plan.kv_lora_rank,
        "Rotary keys x dims": f"{plan.num_rope_key_heads} x {plan.qk_rope_head_dim}",
    }
    rows |= options.preset.card_rows()
    datasets: list[str] = []
    if options.preset.use_of_text is not None:
        assert options.data is not None
        size = f"{options.samples} x {options.length} tokens"
        rows["Calibration"] = f"{size} of {options.data}, seed {options.seed}"
        datasets = hub_datasets(options.data)
    rows["Made with"] = made_with()
    body = BODY.format(
        source_sentence=f"[{source}](https://huggingface.co/{source})" if source_is_repo else f"`{source}`",
        width=plan.width,
        source_width=plan.source_width,
        percent=100 * (plan.ratio - 1),
        note=options.preset.card_note,
        usage=usage(repo),
        fine_tuning=fine_tuning(config.attention_projections),
        recipe=table(rows),
    )
    write_card(path, repo, card_metadata(source, datasets=datasets, revision=revision), body)
