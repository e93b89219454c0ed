"""Small changes to sources, made by rule: every one must make some case fail, or be explained.

``python -m polyaccel_conformance.mutation`` does it to the composites, with the suite's own cases and checks.
"""
