"""Concern: packages, account and folders every host needs."""
