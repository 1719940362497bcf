"""One rule a file; found by walking."""
