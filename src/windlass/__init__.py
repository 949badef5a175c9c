"""Windlass trains convolutional networks fast, with every lever behind one plan."""
