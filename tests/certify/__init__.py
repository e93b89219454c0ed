"""``python -m tests.certify``: everything that takes too long for every change, in parts that can be taken up again."""
