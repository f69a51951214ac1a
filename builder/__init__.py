"""What is run once, before the worker starts: fetching weights, training the miniature model."""
