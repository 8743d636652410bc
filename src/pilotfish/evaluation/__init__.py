"""Measuring a guide: features, metrics, cost, and the one result that feeds every view of it."""
