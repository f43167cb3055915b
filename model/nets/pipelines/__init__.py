"""Imported diffusers pipelines: their unmodified modules, as what a bundle needs of a model.

`network` holds the transformer, `adapters` asks it, one function a family; `texts` encodes prompts with the
pipeline's own code, `decoder` holds the autoencoder.
"""
