"""Concern: Vision-CAIR's own code, as it is, and the files that it is configured by."""
