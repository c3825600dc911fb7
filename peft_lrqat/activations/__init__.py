"""Activations, keys and values in low bits (LR-QAT, section 4.3)."""
