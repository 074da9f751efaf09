"""Shared by concerns: files that are whole and owned by gpufleet."""
