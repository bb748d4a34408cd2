"""Read, convert, adapt and write weights."""
