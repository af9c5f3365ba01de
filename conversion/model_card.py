"""The README.md of a converted checkpoint."""

from huggingface_hub import ModelCard, ModelCardData

from .cache_plan import CachePlan
from .config import ConversionConfig

TEMPLATE = """---
{front_matter}
---

# {title}

{source_sentence} whose attention has been converted to Multi-head Latent Attention (MLA) with
[mha2mla]: its cache holds **{width} numbers per token and layer instead of {source_width}
({percent:+.2f} %)**.

{note}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{repo}")
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

It needs transformers >= 5.17 and nothing else; `generate` picks the latent cache by itself.

## Recipe

| | |
|---|---|
{rows}

`conversion.json` holds everything needed to repeat it, the frequencies that kept RoPE in each layer included.

[mha2mla]: https://arxiv.org/abs/2502.14837
"""


def write_model_card(
    path, source: str, source_is_repo: bool, repo: str, options: ConversionConfig, plan: CachePlan, versions: dict
) -> None:
    """Write the card; `source` is named as the base model only if it is a repository on the Hub."""
    rows = {
        "Source": source,
        "Preset": options.preset.name,
        "kv_lora_rank": plan.kv_lora_rank,
        "Rotary keys x dims": f"{plan.num_rope_key_heads} x {plan.qk_rope_head_dim}",
    }
    rows |= options.preset.card_rows()
    if options.preset.use_of_text is not None:
        size = f"{options.calibration_samples} x {options.calibration_length} tokens"
        rows["Calibration"] = f"{size} of {options.calibration_data}, seed {options.seed}"
    rows["Made with"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mla", "multi-head-latent-attention", "kv-cache-compression", "mha2mla"],
        base_model=source if source_is_repo else None,
    )
    text = TEMPLATE.format(
        front_matter=data.to_yaml(),
        title=repo,
        source_sentence=f"[{source}](https://huggingface.co/{source})" if source_is_repo else f"`{source}`",
        width=plan.width,
        source_width=plan.source_width,
        percent=100 * (plan.ratio - 1),
        note=options.preset.card_note,
        repo=repo,
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
    )
    ModelCard(text).save(path)
