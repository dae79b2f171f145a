"""Finished measurements of a long benchmark, so that it can be stopped and run again."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Notes:
    """Measurements by name, in a JSON file that is replaced at once after each.

    Raises:
        SystemExit: the file holds measurements with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        asked = {name: str(value) for name, value in settings.items()}
        if self.once("settings", lambda: asked) != asked:
            raise SystemExit(f"{path} holds measurements with other settings; repeat those, or name a new folder.")

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """The value noted under ``name``, measured where there is none yet."""
        if name not in self.found:
            self.write(name, measure())
        return self.found[name]

    def write(self, name: str, value: Any) -> None:
        """Note a value."""
        self.found[name] = value
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.found, indent=1))
        os.replace(new, self.path)
        print(f"{time.strftime('%H:%M:%S')} {name}: {value}", flush=True)
