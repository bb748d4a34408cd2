"""The wrapper round diffusers' Stable Diffusion. The only room that imports diffusers and transformers.

`plan` and `prompts` import no torch: what can be checked cheaply is checked before it.
"""
