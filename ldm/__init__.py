"""Latent diffusion models and textual inversion."""
