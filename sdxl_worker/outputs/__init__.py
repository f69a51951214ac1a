"""From pictures to the answer: encoding, the metadata of a file, the limits of the platform.
Neither the model's networks nor torch are used."""
