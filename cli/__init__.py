"""The `mha2mla` command: one small file a sub-command."""
