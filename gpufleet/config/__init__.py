"""Concern: the two YAML files of the model."""
