"""What a request points to becomes something to draw with: bytes are fetched, pictures decoded and
fitted. Neither the model's networks nor torch are used."""
