"""Which rotary pairs of a head keep RoPE: the rules of the paper (MHA2MLA, arXiv 2502.14837, section 3.1).

A rule is a module of this folder, found by itself, with

- `NAME`, as `--rope-selection` has it;
- `NEEDS_TEXT`, whether it measures the model on calibration text;
- `select(num_kept, num_pairs)`, which gives the ascending indices of the pairs that keep RoPE in every head,
  [num_kept]; or, if it needs text, `select(num_kept, query_norms, key_norms)`, which gives those of each key/value
  head, [G, num_kept], from the mean length of each pair of the queries [H, d/2] and of the keys [G, d/2].
"""

from mha2mla.common.discovery import NamedModules

RULES = NamedModules(__name__, __path__)
