"""Weights to many hosts at the cost of one upload: hosts exchange pieces among themselves."""
