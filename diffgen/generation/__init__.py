"""What can be asked of any model: options, plans, grid files. No torch."""
