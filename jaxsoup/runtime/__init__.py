"""What every long-running command needs; knows no soups and no checkpoints.

Locks, being stopped, progress, several processes, logs, code of the user's.
"""
