"""Making text: greedy, sampled, drafted, in a conversation or in batches."""
