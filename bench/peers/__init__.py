"""Servers written as other frameworks' documentation would have it, around one and the same model: what ours is compared with."""
