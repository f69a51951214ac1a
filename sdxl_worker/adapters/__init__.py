"""What a job adds to the networks that are loaded: the files' formats, and weights that are changed
in place and put back. Nothing is fetched here."""
