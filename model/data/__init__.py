"""Picture sets: reading, checking, preparing and encoding them; `python -m model.data`."""
