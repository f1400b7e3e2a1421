"""What the rooms share: the coupled block, clocks, memory, records and pages. It imports none of them."""
