"""Grouped matrix products on CPU: machine code of Numba's, called by XLA."""
