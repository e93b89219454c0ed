"""Several devices: one process a rank, all in lock-step, with a control plane that is not under test."""
