"""Models and data of others, brought here with a note of where they came from."""
