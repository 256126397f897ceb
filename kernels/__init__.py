"""Device code of the project: the decoder, the token log-probability, and (when it comes) the decode kernels."""
