"""Decoding with the latent cache."""
