"""The data contract: schemas, the commit log, sources and latent shards. No ray, no torch."""
