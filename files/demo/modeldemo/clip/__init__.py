"""CLIP: which of several labels fits a picture, and how well."""
