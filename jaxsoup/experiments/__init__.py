"""Experiments: pre-train, fine-tune a sweep, make soups, evaluate, report."""
