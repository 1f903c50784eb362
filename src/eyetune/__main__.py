"""`python -m eyetune`, also the module that torchrun starts."""

import sys

from eyetune.cli import main

sys.exit(main())
