"""How a model runs here: packed tokens, kernels with their own backward, the output layer a few logits at a time."""
