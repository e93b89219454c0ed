"""The float64 oracle: what is right, and by how much a right implementation may differ. Independent of torch and of
the composites."""
