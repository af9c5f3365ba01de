"""Low-rank factors of the un-rotated keys and the values (MHA2MLA, arXiv 2502.14837, section 3.2).

A method is a module of this folder, found by itself, with

- `NAME`, as `--svd` has it;
- `ranks(key_rows, value_rows, hidden_size)`, the sizes that its latent may have, as a range; of one size only, if it
  does not compress;
- `factorise(keys, values, rank)`, which gives the latent down [R, hidden] of the un-rotated key rows of all heads
  [key_rows, hidden], of which there may be none, and the value rows [value_rows, hidden]; and what expands it again,
  key_up [key_rows, R] and value_up [value_rows, R].
"""

from mha2mla.common.discovery import NamedModules

METHODS = NamedModules(__name__, __path__)
