"""`python -m unimodal.adapters mteb|clip_benchmark ...`: see `unimodal.adapters.programs`."""

import sys

from unimodal.adapters.programs import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
