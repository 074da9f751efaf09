"""Concern: package mirrors of apt, pip, uv and conda."""
