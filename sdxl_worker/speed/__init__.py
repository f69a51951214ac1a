"""What makes drawing faster: changes to the networks, permanent or around a stage, and keeping what
was compiled. Nothing here decides what is drawn."""
