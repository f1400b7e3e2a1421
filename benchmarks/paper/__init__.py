"""The paper's experiments on CIFAR-10 and on transport: campaigns of training runs, their tables and figures."""
