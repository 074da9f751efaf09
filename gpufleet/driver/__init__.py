"""Concern: the NVIDIA driver: which one, for which kernels, and whether it will come back."""
