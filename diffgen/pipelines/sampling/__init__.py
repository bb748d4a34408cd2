"""From prompts and noise to pictures, batch by batch."""
