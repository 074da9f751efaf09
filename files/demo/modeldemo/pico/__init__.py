"""The pico model: a real MiniGPT-4 of tiny sizes, trained from scratch on pictures drawn here."""
