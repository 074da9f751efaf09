"""Concern: the model's files, verified on both sides."""
