"""MiniGPT-4 on current transformers classes, read from its original checkpoint files."""
