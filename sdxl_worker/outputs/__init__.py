"""From pictures to the answer: encoding, what a file tells of itself, what the platform can take.
No network of the model, and no torch."""
