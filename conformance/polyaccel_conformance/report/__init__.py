"""A run as text: for the terminal, as JSON, Markdown, and one HTML page."""
