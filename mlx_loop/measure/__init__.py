"""What loops do to a model: comparison, traces, studies and their statistics."""
