"""HTTP: what clients, operators and browsers see. Nothing here computes an image."""
