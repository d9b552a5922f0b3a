"""What is in a model folder, known before a model is made of it."""
