"""Starting the web app in a process of Streamlit's."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from zoo.errors import ZooError

SCRIPT = Path(__file__).with_name("main.py")


def serve(registry: str, store: Path, host: str, port: int | None) -> NoReturn:
    """Become the server; it ends with Ctrl-C. port: None takes 8501, or the next one that is free."""
    if find_spec("streamlit") is None:
        raise ZooError(
            "the web app needs streamlit, which is not installed", try_="pip install '.[app]' in a checkout"
        )
    environment = {
        "ZOO_REGISTRY": registry if "://" in registry else str(Path(registry).expanduser().absolute()),
        "ZOO_STORE": str(store.expanduser().absolute()),
    }
    options = {"server.address": host, "browser.gatherUsageStats": "false", "server.showEmailPrompt": "false"}
    if port is not None:
        options["server.port"] = str(port)
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "streamlit", "run", str(SCRIPT), *flags]
    sys.stdout.flush()
    os.execve(sys.executable, command, os.environ | environment)
