"""Latent diffusion as jobs of `diffgen train`: the autoencoder, then the UNet with its text encoder on its latents."""
