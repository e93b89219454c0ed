"""Adapter files, receipts, packing and slots."""
