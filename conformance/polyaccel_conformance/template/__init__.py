"""A new backend's package, as ``polyaccel new-backend`` writes it."""
