"""Trains the embedded base model, a small FLUX, from the emoji data set of `tools.emoji`.

The order is `autoencoder`, `denoiser`, `assemble`, `score`; `make starter` runs all four.
"""
