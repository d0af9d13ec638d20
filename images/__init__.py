"""Container images: how they are built, what is in them, and what shows that they work."""
