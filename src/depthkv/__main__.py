"""`python -m depthkv`, which torchrun and accelerate launch want."""

import sys

from depthkv.cli import main

sys.exit(main())
