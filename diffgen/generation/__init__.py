"""Requests to any model: the table of options, plans, grid files, records; the protocol Generator. No torch."""
