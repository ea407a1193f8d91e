"""Training of models as pure functions; knows nothing of soups."""
