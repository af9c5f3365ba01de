"""The preset `paper`: MHA2MLA, arXiv 2502.14837."""
