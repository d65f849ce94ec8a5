"""What checks the project and is neither a test nor a benchmark. CONTRIBUTING.md says when to run which."""
