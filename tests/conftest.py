"""Nothing but the folder on the path, so that tests can import the independent references beside them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
