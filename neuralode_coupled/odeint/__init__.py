"""Any vector field under torchdiffeq's signature, with the exact gradient of the discrete solve."""
