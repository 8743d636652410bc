"""Cost and memory of guides at full size, on random weights."""
