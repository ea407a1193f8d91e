"""The subcommands of `jaxsoup`, one per file, and what they share."""
