"""The arithmetic of one integrator update, shared by every integrator."""

from .update import Anderson, Form, Rescale, combine, on_gpu, token_norm, update

__all__ = ["Anderson", "Form", "Rescale", "combine", "on_gpu", "token_norm", "update"]
