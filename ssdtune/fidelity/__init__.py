"""How far a packed model is off its source, and what its weights meet: both seen on a text."""
