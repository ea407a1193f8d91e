"""Recipes: plain functions that choose the mixing coefficients alpha."""
