"""The texts that perplexity is measured on, by file name or by the name of one that every machine has."""

import json
from pathlib import Path


def read_text(name: str) -> str:
    """The text of a file; of a ``.jsonl`` file all strings; ``pydoc`` is the language reference of Python itself."""
    if name == "pydoc":
        from pydoc_data.topics import topics

        return "\n\n".join(topics[topic] for topic in sorted(topics))
    content = Path(name).read_text(encoding="utf-8")
    if not name.endswith(".jsonl"):
        return content
    rows = [json.loads(line) for line in content.splitlines()]
    return "\n\n".join("\n".join(value for value in row.values() if isinstance(value, str)) for row in rows)
