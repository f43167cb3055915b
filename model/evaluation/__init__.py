"""Evaluation of generated pictures: features, distances, memorisation, and the classifier that judges."""
