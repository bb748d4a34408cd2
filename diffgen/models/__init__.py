"""Models: find one by name, check its files before anything is loaded, say what it is. Imports no torch."""
