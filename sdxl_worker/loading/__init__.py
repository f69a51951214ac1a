"""From a folder to networks in memory: which model, which files, how they are read. Nothing here
draws, and nothing is made faster than it was trained."""
