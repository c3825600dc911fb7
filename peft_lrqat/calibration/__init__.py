"""Rounding a model to a grid one block at a time, with the help of calibration data."""
