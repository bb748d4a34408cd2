"""Pictures: reading safely, naming, publishing, metadata. The only room that knows pixel ranges. Imports no torch."""
