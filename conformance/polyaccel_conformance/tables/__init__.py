"""Other projects' operators as tables: ``polyaccel conformance run --table <this folder>/torch_eager.py:EAGER``."""
