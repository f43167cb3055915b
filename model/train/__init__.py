"""The trainer: configuration, steps, checkpoints, distillation; `python -m model.train`."""
