"""What runs on the device, and on several of them: the decoder, the token log-probability, the sampler, processes."""

import os

# A thread that spins at a barrier makes a run ten times slower beside any other load. OpenMP reads this once, when
# torch is imported, so every stage imports this package first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
