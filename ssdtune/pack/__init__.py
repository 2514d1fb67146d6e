"""`ssdtune pack`: packs a model, and says what the packing costs."""
