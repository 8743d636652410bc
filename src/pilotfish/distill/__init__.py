"""Distillation: a guide learns equation (1) from a frozen base."""
