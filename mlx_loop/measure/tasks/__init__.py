"""What is measured: problems and how their answers are scored."""
