"""Measuring speed, and saying what it was measured on."""
