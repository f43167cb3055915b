"""Training of the small autoencoder, `python -m model.train.autoencoder`."""
