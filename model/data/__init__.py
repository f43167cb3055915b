"""Data sets of pictures: reading, checking, preparing and encoding them; `python -m model.data`."""
