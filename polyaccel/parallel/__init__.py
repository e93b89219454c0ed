"""How work is spread over ranks."""
