"""From a folder to networks in memory: which model, which files, how they are read. Nothing
is drawn or optimized here."""
