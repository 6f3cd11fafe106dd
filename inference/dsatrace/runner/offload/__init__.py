"""Decoding with latents outside HBM: the cache, what fetches ahead for it, and what it has moved."""
