"""What the site does differently from a viewer of Markdown on a code host: see mkdocs.yml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

# a list directly below its introduction is a list on code hosts, and part of the paragraph for Python-Markdown
_TIGHT_LIST = re.compile(r"^(?![-*|#>\s])(.+)\n(?=- )", re.MULTILINE)


def on_files(files: Any, config: Any, **kwargs: Any) -> Any:
    """CONTRIBUTING.md, which lies beside docs/, becomes a page."""
    text = Path(config.config_file_path).with_name("CONTRIBUTING.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "contributing.md", content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Links to CONTRIBUTING.md lead to that page."""
    return _TIGHT_LIST.sub(r"\1\n\n", markdown.replace("../CONTRIBUTING.md", "contributing.md"))
