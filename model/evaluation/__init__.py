"""Measures of generated pictures: features, Fréchet distance, fidelity, neighbours, the classifier."""
