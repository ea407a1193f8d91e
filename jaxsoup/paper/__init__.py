"""The experiments of the paper, measured again; nothing imports this room."""
