"""Meeting points: the model's own forward, micro-batch by micro-batch, blocks one at a time."""
