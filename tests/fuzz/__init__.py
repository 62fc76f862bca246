"""Fuzzers of everything that reads a file from elsewhere; see targets.py. `make fuzz MINUTES=60` runs them."""
