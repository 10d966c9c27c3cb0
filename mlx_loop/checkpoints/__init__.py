"""Checkpoints: loading, quantising, saving, sharing, and the memory that they need."""
