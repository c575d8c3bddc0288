"""Stores that travel: cards for those who get one, export to other formats, import from them."""
