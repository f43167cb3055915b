"""What a Diffusion Transformer is and how it learns; knows nothing of serving."""
