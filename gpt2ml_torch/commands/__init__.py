"""The subcommands of `gpt2ml`, one a module: `add_arguments(parser)` and `run(arguments)`."""
