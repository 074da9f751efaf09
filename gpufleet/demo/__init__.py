"""Concern: the demo as a systemd service."""
