"""Concern: what the next package upgrade would change, asked without changing anything."""
