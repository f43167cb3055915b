"""Networks and their layers: DiT, U-Net, conditioner, autoencoder and text encoders."""
