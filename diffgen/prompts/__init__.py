"""Prompts: syntax, wildcards, styles, files, words, tokens. No torch."""
