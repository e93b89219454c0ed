"""The null backend: no arithmetic, scripted tokens, fake latency. It makes the host's cost per step measurable."""
