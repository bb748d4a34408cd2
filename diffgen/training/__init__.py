"""Training a diffusion model from scratch, and pictures from what was trained."""
