"""Model definitions and their configuration."""
