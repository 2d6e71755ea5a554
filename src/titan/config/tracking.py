"""Whether Weights & Biases has a key here; its own library would ask for one on the terminal, and wait."""

from __future__ import annotations

import contextlib
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit


def has_wandb_key() -> bool:
    """Return whether the environment or the user's netrc file has a key; looks at no key itself."""
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "")).netloc
    for path in (os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            hosts = netrc.netrc(str(path)).hosts if path else {}
            if any(host == server or "wandb" in host for host in hosts):
                return True
    # a server of one's own that was set with `wandb login --host`: its netrc entry has any name
    with contextlib.suppress(OSError):
        return "base_url" in (Path.home() / ".config" / "wandb" / "settings").read_text()
    return False
