"""What a request points to becomes something to draw with: bytes that are fetched, pictures that
are decoded and fitted. No network of the model, and no torch."""
