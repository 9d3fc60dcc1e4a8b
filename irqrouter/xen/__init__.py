"""Xen event channels, bit level and pure."""
