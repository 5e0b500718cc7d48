"""Requests in, steps, outputs out: the loop of the engine, what comes in, and the way from tokens back to text."""
