"""Models from elsewhere: brought under models/ with a note of where they came from."""
