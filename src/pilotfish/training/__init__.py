"""Distillation: a guide learns beside a frozen base, stage by stage."""
