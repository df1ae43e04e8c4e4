"""The repository's own chores: set-up, demo, tests, lint, benchmarks, training the demo."""
