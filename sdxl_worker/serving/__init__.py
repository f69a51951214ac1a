"""The worker as a process: its start, its jobs, progress, stopping, logs and command line. What is
drawn does not matter here."""
