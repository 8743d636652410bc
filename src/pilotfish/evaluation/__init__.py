"""Measuring a guide against its model's own CFG: quality, guidance error, cost."""
