"""Concern: the kernels of a host, which one boots next, and the pin that keeps it."""
