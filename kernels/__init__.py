"""Device code of the project: the decoder, the token log-probability, and the sampler's cache and attention."""
