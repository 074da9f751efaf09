"""Runs pyinfra's own command and follows it: events, log, lock, and errors in one line."""
