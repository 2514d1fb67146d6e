"""Moves bytes between tiers as a plan says; knows nothing of models or methods."""
