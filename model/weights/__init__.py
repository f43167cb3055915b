"""The layouts of other projects' weights, to and from ours: the official DiT and diffusers."""
