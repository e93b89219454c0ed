"""A backend written against API 1.0 of polyaccel, never edited again."""
