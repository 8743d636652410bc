"""The comparison of all methods under one budget and one measurement."""
