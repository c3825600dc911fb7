"""Pairs of factors at a few bits (LoRAQuant, arXiv 2510.26690): groups, SVD, allocation, bytes.
Pure tensors.
"""
