"""Serves a picture-chat or text-chat model to people and programs; imports nothing heavy."""

__version__ = "0.1.0"
