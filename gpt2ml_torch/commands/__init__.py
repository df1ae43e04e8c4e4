"""The subcommands of `gpt2ml`; each module has `add_arguments(parser)` and `run(arguments)`."""
