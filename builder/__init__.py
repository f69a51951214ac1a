"""What the build of an image runs."""
