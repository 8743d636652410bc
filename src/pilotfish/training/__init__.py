"""Training of guides: stage 1 (one pass in place of two) and stage 2 (half the sampling steps)."""
