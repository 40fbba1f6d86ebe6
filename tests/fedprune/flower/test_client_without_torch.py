"""What a client of Flower's loads does without torch."""

import subprocess
import sys
from pathlib import Path

from fedprune.flower import app

CLIENT = f"""
import sys
sys.modules["torch"] = None  # importing it is an ImportError
sys.path.insert(0, {str(Path(app.__file__).parent)!r})
from fedprune_client import app
print(type(app).__name__)
"""


def test_the_clients_module_of_the_app_imports_no_torch() -> None:
    """`flwr-clientapp` loads this module; the server's is another."""
    done = subprocess.run(
        [sys.executable, "-c", CLIENT], capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("ClientApp", 0), done.stderr
