"""Every method that does without the second pass of CFG, side by side under one measurement."""
