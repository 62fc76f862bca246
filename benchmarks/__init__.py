"""Benchmarks: they time the real code, never a copy of it, and nothing imports them."""
