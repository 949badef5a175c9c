"""Chooses plans."""
