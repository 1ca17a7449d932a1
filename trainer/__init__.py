"""The trainer: reads an index of latent shards and nothing else of vidpipe."""
