"""Tools of the repository: set-up, demo, tests, lint, benchmarks, and training the demo."""
