"""A browser without a screen, for what only a browser can say of a page."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
QUIET = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync --disable-component-update"


def look(page: str, probe: str, folder: Path, width: int, dark: bool) -> dict[str, Any]:
    """What the probe finds in the page, in a window of that width (500 is the least that a browser without a screen has).

    probe: a script that leaves its findings as JSON in document.body.dataset.found.
    """
    assert BROWSER is not None
    path = folder / "page.html"
    path.write_text(page.replace("</body>", probe + "</body>"), encoding="utf-8")
    colors = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    window = [f"--window-size={width},900", f"--user-data-dir={folder / 'profile'}", colors]
    command = [BROWSER, *QUIET.split(), *window, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found is not None, done.stderr
    return dict(json.loads(html.unescape(found[1])))
