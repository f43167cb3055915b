"""Distillation: a student network learns from a teacher, by its outputs or to sample in fewer steps."""
