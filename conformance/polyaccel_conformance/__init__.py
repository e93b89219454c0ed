"""The conformance suite: every operator of the contract against float64, on one device and on several."""

SUITE_REVISION = 2
"""Raised whenever a case's data, an oracle's bound or a check's verdict may differ from before."""
