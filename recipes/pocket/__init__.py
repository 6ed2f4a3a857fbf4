"""The recipe of the bundled model."""

import os

# Before torch loads its OpenMP: threads that wait by spinning ruin a training on cores that others use too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
