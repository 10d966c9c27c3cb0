"""Evaluation: long-context tasks and lm-evaluation-harness tasks at many loop settings."""
