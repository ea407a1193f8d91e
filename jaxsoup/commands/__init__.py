"""Commands that are files of their own, and what all commands share."""
