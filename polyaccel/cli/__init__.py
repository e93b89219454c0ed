"""The `polyaccel` command."""
