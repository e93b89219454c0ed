"""Certificates: a run's log, what follows from it, and how anybody can check both again."""
