"""What the package costs and gives, measured. Each room has a subject; README.md says how to run what."""

from neuralode_coupled.train.allocator import keep_freed_memory

# As the command line does: otherwise it is the system's clearing of pages that is measured.
keep_freed_memory()
