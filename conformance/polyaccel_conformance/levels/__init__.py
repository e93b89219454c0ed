"""From results of cases to levels: required cells, what covers them, and what may be granted."""
