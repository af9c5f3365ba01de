"""Ways to make MLA weights: one folder a preset."""
