"""The arithmetic of one integrator update, shared by every integrator."""

from .update import combine, rescale, token_norm

__all__ = ["combine", "rescale", "token_norm"]
