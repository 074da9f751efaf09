"""Concern: the environment that the demo runs in."""
