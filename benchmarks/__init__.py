"""Measured numbers, each a ratio of things done in one run, printed beside its limit."""
