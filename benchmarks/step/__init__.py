"""One training step or forward pass: its time, memory, gradients and precision."""
