"""The ground that the three stages stand on. Imports no stage; a module is here once two stages need it."""

import os

# On some CPUs the last bit of MKL's products depends on where a matrix lies in memory, and a run that is gone on from
# would differ from one that never stopped. MKL looks at this before its first product; on a GPU it changes nothing.
os.environ.setdefault("MKL_CBWR", "AUTO")
