"""What maintainers run: documents made from the code, the image's test, a model of random weights.
Neither the worker nor an image needs any of it."""
