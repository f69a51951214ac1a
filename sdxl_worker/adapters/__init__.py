"""What a job adds to the networks and takes away again: LoRA, textual inversion."""
