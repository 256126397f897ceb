"""What runs on the device, and on several of them: the decoder, the token log-probability, the sampler, processes."""

import os

# A thread that spins at a barrier makes a run two to ten times slower beside any other load; one that sleeps costs an
# idle machine a sixth (the tiny main job), which OMP_WAIT_POLICY=ACTIVE in the environment wins back. OpenMP reads this
# once, when torch is imported, so every stage imports this package first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
