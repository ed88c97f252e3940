"""`python -m unimodal VERB ...`"""

import sys

from unimodal.cli import main

sys.exit(main())
