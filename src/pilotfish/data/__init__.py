"""Prompts and images, read from the user's files."""
