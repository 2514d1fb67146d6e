"""A model's weights to a few bits each, in a new folder that streams like any other."""
