"""Prompts: what a text asks for, before any model reads it. No file here imports torch.

Read them in this order:

    syntax      brackets and weights: a prompt as parts, each with a weight
    wildcards   {a|b} and __file__: random choices, made by the image's seed
    styles      named texts that are put around a prompt
    files       prompt files: one prompt a line, as text or as JSON
    words       checks of a prompt, and the words that a model was not trained on
    tokens      CLIP's tokenizer: a parsed prompt as token numbers, in chunks
    explain     all of the above applied to one prompt, for `diffgen prompt explain`
"""
