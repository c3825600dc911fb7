"""The low-bit base: frozen weights on an integer grid, made once, stored, loaded as they are."""
