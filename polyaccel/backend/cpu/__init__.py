"""The CPU backend: operators and stations from torch's own CPU kernels (oneDNN, MKL, aten); nothing is compiled."""
