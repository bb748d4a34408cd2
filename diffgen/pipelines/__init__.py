"""The wrapper round diffusers: the only room that imports diffusers and transformers."""
