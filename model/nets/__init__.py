"""The networks and their layers: DiT, U-Net, conditioner, autoencoder, text encoders."""
