"""Requests in, steps, outputs out: the loop, and the way from tokens back to text."""
