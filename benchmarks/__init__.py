"""Cost and memory of guides: wall clock, operators, memory, at full size with random weights."""
