"""The arithmetic of one integrator update, shared by every integrator."""

from .update import Rescale, RMSNorm, combine, token_norm, update

__all__ = ["RMSNorm", "Rescale", "combine", "token_norm", "update"]
