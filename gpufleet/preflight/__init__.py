"""Concern: what a host must have before anything changes."""
