"""VAEs of diffusers: uint8 frames in, latents out."""
