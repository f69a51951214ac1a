"""The miniature model: what it was trained on, its training, and judging what a picture shows. Its
weights are in models/shapes."""
