"""Concern: nginx before several processes of a host, or before a whole fleet."""
