"""How a window is looped: integrators, the loop itself, what it sees of the past."""
