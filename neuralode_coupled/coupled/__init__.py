"""The coupled solve: weights and activations, as a function and as a layer."""
